import pickle
import sys
import threading

import cv2
import numpy as np
import pytest
import torch
from basicsr.data import build_dataset
from PIL import ExifTags, Image
from torch.utils.data import DataLoader

from drtl_plugin import cli
from drtl_plugin.data import DistortionTaskDataset, FewShotPairDataset
from drtl_plugin.data.image_files import check_pair_sizes, image_names, image_size, is_turned, require
from drtl_plugin.errors import DataError, OptionError
from drtl_plugin.tasks.patches import augment, paired_patches, random_crop


@pytest.fixture
def task_opt(sample_root) -> dict:
    return {
        'name': 'tasks',
        'type': 'DistortionTaskDataset',
        'dataroot_gt': str(sample_root / 'auxiliary'),
        'gt_size': 64,
        'num_support': 2,
        'num_query': 3,
        'scale': 4,
        'phase': 'train',
        'target': {
            'dataroot_gt': str(sample_root / 'camera/support/gt'),
            'dataroot_lq': str(sample_root / 'camera/support/lq'),
        },
    }


@pytest.fixture
def pair_opt(sample_root) -> dict:
    return {
        'name': 'pairs',
        'type': 'FewShotPairDataset',
        'dataroot_gt': str(sample_root / 'camera/support/gt'),
        'dataroot_lq': str(sample_root / 'camera/support/lq'),
        'io_backend': {'type': 'disk'},
        'scale': 4,
        'phase': 'val',
        'num_shot': 3,
    }


def names(dataset: FewShotPairDataset) -> list[str]:
    return [path['gt_path'].rpartition('/')[2] for path in dataset.paths]


class TestDistortionTaskDataset:
    def test_episodes_have_the_promised_shapes(self, task_opt):
        dataset = build_dataset(task_opt)
        episode = dataset[0]
        assert episode['support_gt'].shape == (2, 3, 64, 64)
        assert episode['query_gt'].shape == (3, 3, 64, 64)
        assert set(episode) == {'index', 'support_gt', 'query_gt'}
        assert len(dataset.target_pairs) == 5
        assert episode['support_gt'].min() >= 0 and 0.1 < episode['support_gt'].max() <= 1

    def test_episodes_do_not_depend_on_loader_processes(self, task_opt):
        loaders = [
            DataLoader(DistortionTaskDataset(task_opt), batch_size=2, num_workers=workers, sampler=[3, 5, 9, 1])
            for workers in (0, 2)
        ]
        for batch, other in zip(*loaders, strict=True):
            for key in batch:
                assert torch.equal(batch[key], other[key]), key

    def test_can_be_sent_to_a_spawned_process(self, task_opt):
        dataset = DistortionTaskDataset(task_opt)
        episode = dataset[2]  # files are open by now
        again = pickle.loads(pickle.dumps(dataset))[2]
        assert torch.equal(episode['query_gt'], again['query_gt'])

    def test_a_spawned_process_gets_no_decoded_images(self, task_opt):
        dataset = DistortionTaskDataset(task_opt)
        dataset.gt_patches(4, torch.Generator().manual_seed(0))
        assert dataset._decoded and not pickle.loads(pickle.dumps(dataset))._decoded

    def test_seed_and_index_change_the_episode(self, task_opt):
        dataset, other = DistortionTaskDataset(task_opt), DistortionTaskDataset({**task_opt, 'seed': 1})
        assert not torch.equal(dataset[0]['query_gt'], dataset[1]['query_gt'])
        assert not torch.equal(dataset[0]['query_gt'], other[0]['query_gt'])

    def test_flips_and_turns_can_be_switched_off(self, task_opt, tmp_path):
        y, x = np.mgrid[:64, :64]
        ramp = (y + 2 * x).astype(np.uint8)  # looks different after each flip and turn
        cv2.imwrite(str(tmp_path / 'ramp.png'), ramp)
        task_opt.update(dataroot_gt=str(tmp_path), num_query=8)
        for options in ({'use_hflip': False, 'use_rot': False}, {}):
            patches = DistortionTaskDataset({**task_opt, **options})[0]['query_gt'] * 255
            unturned = [torch.equal(patch[0].round().byte(), torch.from_numpy(ramp)) for patch in patches]
            assert all(unturned) == bool(options)

    def test_patches_are_rgb_pieces_of_the_images(self, task_opt, tmp_path):
        blue = np.zeros((64, 80, 3), np.uint8)
        blue[..., 0] = 200  # OpenCV writes BGR
        cv2.imwrite(str(tmp_path / 'blue.png'), blue)
        patch = DistortionTaskDataset({**task_opt, 'dataroot_gt': str(tmp_path)})[0]['query_gt'][0]
        assert patch.mean(dim=(1, 2)).tolist() == pytest.approx([0, 0, 200 / 255])

    def test_lmdb_gives_what_the_folder_gives(self, task_opt, tmp_path):
        lmdb = str(tmp_path / 'auxiliary.lmdb')
        assert cli.main(['lmdb', task_opt['dataroot_gt'], lmdb]) == 0
        from_lmdb = DistortionTaskDataset({**task_opt, 'dataroot_gt': lmdb, 'io_backend': {'type': 'lmdb'}})
        assert torch.equal(DistortionTaskDataset(task_opt)[7]['query_gt'], from_lmdb[7]['query_gt'])

    def test_meta_info_file_chooses_images(self, task_opt, tmp_path):
        (tmp_path / 'meta.txt').write_text('brick.png (512,512,3)\n')
        dataset = DistortionTaskDataset({**task_opt, 'meta_info_file': str(tmp_path / 'meta.txt')})
        assert [key.rpartition('/')[2] for key in dataset.keys] == ['brick.png']

    def test_decoded_images_are_kept_within_bounds(self, task_opt):
        # Three loaders and the model share it: two images each.
        dataset = DistortionTaskDataset({**task_opt, 'num_worker_per_gpu': 3, 'image_cache_mb': 4 * 2 * 0.75})
        textures = [i for i, key in enumerate(dataset.keys) if key.endswith(('brick.png', 'grass.png', 'gravel.png'))]
        for index in textures:  # of 512 x 512 pixels each
            dataset._image(index)
        assert list(dataset._decoded) == textures[1:]
        dataset = DistortionTaskDataset({**task_opt, 'image_cache_mb': 0})
        assert dataset._image(textures[0]).shape == (512, 512, 3)
        assert not dataset._decoded

    def test_several_threads_may_draw_at_once(self, task_opt, monkeypatch):
        """A prefetcher's thread and the model do."""
        image = np.zeros((64, 64, 3), np.uint8)
        dataset = DistortionTaskDataset(task_opt)
        monkeypatch.setattr(dataset, '_read_image', lambda index: image.copy())
        monkeypatch.setattr(dataset, '_cache_size', 300 * image.nbytes)
        errors = []

        def draw(first: int) -> None:
            try:
                for index in range(first, first + 1000):
                    dataset._image(index)
            except RuntimeError as error:
                errors.append(error)

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            threads = [threading.Thread(target=draw, args=(first,)) for first in (0, 1000)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        assert not errors
        assert len(dataset._decoded) == 300

    @pytest.mark.parametrize(
        ('change', 'error', 'message'),
        [
            ({'gt_size': 66}, OptionError, 'gt_size: 66 is not a multiple of scale 4'),
            ({'gt_sise': 64}, OptionError, "unknown key 'gt_sise'; did you mean 'gt_size'"),
            ({'dataroot_gt': 'nowhere'}, DataError, 'dataroot_gt: there is no folder nowhere'),
            ({'distortions': [{'name': 'jpg'}]}, OptionError, "unknown distortion 'jpg'; did you mean 'jpeg'"),
        ],
    )
    def test_wrong_options_are_named(self, task_opt, change, error, message):
        with pytest.raises(error, match=message):
            DistortionTaskDataset({**task_opt, **change})

    def test_unfit_images_are_named_when_they_are_met(self, task_opt, tmp_path):
        cv2.imwrite(str(tmp_path / 'tiny.png'), np.zeros((32, 32, 3), np.uint8))
        with pytest.raises(DataError, match=r'tiny\.png: 32x32 is smaller than gt_size 64'):
            DistortionTaskDataset({**task_opt, 'dataroot_gt': str(tmp_path)})[0]
        (tmp_path / 'tiny.png').write_bytes(b'no image')
        with pytest.raises(DataError, match=r'tiny\.png.*cannot be read as an image'):
            DistortionTaskDataset({**task_opt, 'dataroot_gt': str(tmp_path)})[0]

    def test_sizes_are_checked_without_decoding(self, task_opt, tmp_path):
        cv2.imwrite(str(tmp_path / 'flat.png'), np.zeros((64, 63, 3), np.uint8))
        with pytest.raises(DataError, match=r'flat\.png: 63x64 is smaller than gt_size 64'):
            DistortionTaskDataset({**task_opt, 'dataroot_gt': str(tmp_path)}).check_image_sizes()
        lmdb = str(tmp_path / 'flat.lmdb')
        cli.main(['lmdb', str(tmp_path), lmdb])
        with pytest.raises(DataError, match='flat: 63x64 is smaller'):
            DistortionTaskDataset({**task_opt, 'dataroot_gt': lmdb, 'io_backend': {'type': 'lmdb'}}).check_image_sizes()


class TestFewShotPairDataset:
    def test_seed_chooses_k_pairs_and_says_which_again(self, pair_opt):
        choices = {tuple(names(build_dataset({**pair_opt, 'seed': seed}))) for seed in range(20)}
        assert len(choices) > 1
        assert all(len(set(choice)) == 3 for choice in choices)
        assert names(FewShotPairDataset(pair_opt)) == names(FewShotPairDataset(pair_opt))

    def test_names_choose_pairs(self, pair_opt):
        dataset = FewShotPairDataset({**pair_opt, 'names': ['5_rocket', '1_astronaut']})
        assert names(dataset) == ['5_rocket.png', '1_astronaut.png']

    def test_all_pairs_in_full(self, pair_opt):
        dataset = FewShotPairDataset({**pair_opt, 'phase': 'train', 'gt_size': 32})
        assert dataset[0]['gt'].shape == (3, 32, 32)  # training crops
        pairs = dataset.pairs()
        assert len(pairs) == 3
        assert all(lq.shape == (3, 56, 56) and gt.shape == (3, 224, 224) for lq, gt in pairs)

    def test_lmdb_and_meta_info_file_give_the_same_pairs(self, pair_opt, tmp_path):
        lmdb = {key: str(tmp_path / f'{key}.lmdb') for key in ('dataroot_gt', 'dataroot_lq')}
        for key, path in lmdb.items():
            assert cli.main(['lmdb', pair_opt[key], path]) == 0
        meta = tmp_path / 'meta.txt'
        meta.write_text('\n'.join(f'{name} (224,224,3)' for name in image_names(pair_opt['dataroot_gt'], 'gt')))
        from_folder = FewShotPairDataset(pair_opt).pairs()
        from_lmdb = FewShotPairDataset({**pair_opt, **lmdb, 'io_backend': {'type': 'lmdb'}}).pairs()
        from_meta = FewShotPairDataset({**pair_opt, 'meta_info_file': str(meta)}).pairs()
        for pair, *others in zip(from_folder, from_lmdb, from_meta, strict=True):
            for other in others:
                assert torch.equal(pair[0], other[0]) and torch.equal(pair[1], other[1])

    @pytest.mark.parametrize(
        ('change', 'message'),
        [
            ({'num_shot': 6}, 'num_shot is 6, but there are 5 pairs'),
            ({'dataroot_lq': 'nowhere'}, 'dataroot_lq: there is no folder nowhere'),
            ({'scale': 2}, r"LQ of 56x56 and GT of 224x224 \(.*\) don't fit scale 2"),
        ],
    )
    def test_unfit_pairs_are_named(self, pair_opt, change, message):
        with pytest.raises(DataError, match=message):
            FewShotPairDataset({**pair_opt, **change})

    def test_unknown_names_are_named(self, pair_opt):
        with pytest.raises(OptionError, match="unknown pair '5_rockett'; did you mean '5_rocket'"):
            FewShotPairDataset({**pair_opt, 'names': ['5_rockett']})

    def test_folders_that_do_not_match_are_named(self, pair_opt, sample_root):
        with pytest.raises(DataError, match='different number of images'):
            FewShotPairDataset({**pair_opt, 'dataroot_gt': str(sample_root / 'camera/val/gt')})


class TestPairSizes:
    def test_validation_may_exceed_by_less_than_the_scale(self, pair_opt, tmp_path):
        for folder, size in (('lq', 16), ('gt', 66)):
            (tmp_path / folder).mkdir()
            cv2.imwrite(str(tmp_path / folder / 'a.png'), np.zeros((size, size, 3), np.uint8))
        opt = {**pair_opt, 'dataroot_gt': str(tmp_path / 'gt'), 'dataroot_lq': str(tmp_path / 'lq'), 'num_shot': 1}
        check_pair_sizes(FewShotPairDataset(opt))
        with pytest.raises(DataError, match='LQ of 16x16 and GT of 66x66'):
            FewShotPairDataset({**opt, 'phase': 'train'})

    def test_lmdb_sizes_are_checked_too(self, pair_opt, tmp_path):
        lmdb = {key: str(tmp_path / f'{key}.lmdb') for key in ('dataroot_gt', 'dataroot_lq')}
        for key, path in lmdb.items():
            cli.main(['lmdb', pair_opt[key], path])
        with pytest.raises(DataError, match="don't fit scale 3"):
            FewShotPairDataset({**pair_opt, **lmdb, 'io_backend': {'type': 'lmdb'}, 'scale': 3})

    def test_sizes_are_those_of_upright_images(self, tmp_path):
        path = str(tmp_path / 'turned.jpg')
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        Image.new('RGB', (64, 32)).save(path, exif=exif)
        assert image_size(path) == cv2.imread(path).shape[:2] == (64, 32)
        assert is_turned(path)

    def test_files_that_are_no_images(self, tmp_path):
        (tmp_path / 'a.png').write_bytes(b'')
        with pytest.raises(DataError, match=r'a\.png: cannot be read as an image'):
            image_size(str(tmp_path / 'a.png'))
        (tmp_path / 'a.png').unlink()
        with pytest.raises(DataError, match='contains no images'):
            image_names(str(tmp_path), 'folder')
        (tmp_path / 'x.lmdb').mkdir()
        with pytest.raises(DataError, match=r'meta_info\.txt is missing'):
            require(str(tmp_path / 'x.lmdb'), 'dataroot_gt')


class TestPatches:
    def test_pairs_are_cropped_at_the_same_place(self, generator):
        lq = (torch.arange(20 * 30) % 256).byte().view(1, 20, 30)
        gt = lq.repeat_interleave(2, 1).repeat_interleave(2, 2)
        lq_patches, gt_patches = paired_patches([(lq, gt)], 16, 8, generator)
        assert lq_patches.shape == (16, 1, 8, 8)
        assert torch.equal(gt_patches[..., ::2, ::2], lq_patches)
        assert lq_patches.max() <= 1
        assert len({patch.sum().item() for patch in lq_patches}) > 8

    def test_every_pair_is_visited(self, generator):
        pairs = [tuple(torch.full((1, side, side), i, dtype=torch.uint8) for side in (8, 16)) for i in range(5)]
        lq, _ = paired_patches(pairs, 5, 8, generator)
        assert sorted((lq[:, 0, 0, 0] * 255).round().tolist()) == [0, 1, 2, 3, 4]

    def test_patches_shrink_to_the_smallest_pair(self, generator):
        pair = (torch.zeros(3, 6, 9, dtype=torch.uint8), torch.zeros(3, 24, 36, dtype=torch.uint8))
        lq, gt = paired_patches([pair], 2, 48, generator)
        assert lq.shape == (2, 3, 6, 6) and gt.shape == (2, 3, 24, 24)

    def test_crops_reach_all_corners(self, generator):
        image = torch.arange(9).view(1, 3, 3)
        corners = {int(random_crop([image], [2], generator)[0][0, 0, 0]) for _ in range(60)}
        assert corners == {0, 1, 3, 4}

    def test_augmentation_has_all_eight_positions_or_none(self, generator):
        image = torch.arange(4).view(1, 2, 2)
        positions = {tuple(augment([image], generator)[0].flatten().tolist()) for _ in range(200)}
        assert len(positions) == 8
        assert torch.equal(augment([image], generator, hflip=False, rot=False)[0], image)
