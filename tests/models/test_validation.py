"""Restoring an image in validation."""

import torch


def test_windows_are_padded_as_swinirmodel_does(build, quick_opt):
    from basicsr.models.swinir_model import SwinIRModel

    quick_opt['network_g'] = {
        'type': 'SwinIR', 'upscale': 4, 'img_size': 16, 'window_size': 8, 'depths': [2], 'embed_dim': 12,
        'num_heads': [2], 'mlp_ratio': 2, 'upsampler': 'pixelshuffledirect',
    }  # fmt: skip
    model = build(quick_opt)
    model.feed_data({'lq': torch.rand(1, 3, 13, 16)})
    model.test()
    ours = model.output
    SwinIRModel.test(model)
    assert torch.equal(ours, model.output)


def test_large_images_are_tested_tile_by_tile(build, quick_opt):
    model = build(quick_opt)
    sides = []
    model.net_g_ema.register_forward_hook(lambda module, inputs, output: sides.append(max(inputs[0].shape[-2:])))
    model.feed_data({'lq': torch.rand(1, 3, 90, 60)})
    model.test()
    whole = model.output
    model.opt['val'].update(tile=24, overlap=8)
    model.test()
    torch.testing.assert_close(model.output, whole, rtol=1e-4, atol=1e-5)
    assert sides[0] == 90 and len(sides) == 1 + 4 * 3 and max(sides[1:]) <= 24 + 2 * 8
