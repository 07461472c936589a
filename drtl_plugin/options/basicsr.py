"""The options that BasicSR's models and datasets share with ours: type, range, default and description of each."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from drtl_plugin.options.convert import LARGEST, Section


def _disk() -> dict[str, Any]:
    return {'type': 'disk'}


class PairedDatasetOptions(Section, frozen=True, kw_only=True):
    """``datasets.val…``, ``datasets.test…``, and ``train`` of BasicSR's models: ``PairedImageDataset``."""

    name: Annotated[str, Meta(description='Name of the dataset in the log and in folders of restored images.')]
    type: Annotated[str, Meta(description='PairedImageDataset.')]
    dataroot_gt: Annotated[str, Meta(description='Folder or .lmdb of GT images.')]
    dataroot_lq: Annotated[str, Meta(description='Folder or .lmdb of LQ images.')]
    meta_info_file: Annotated[str | None, Meta(description='Text file that lists the images.')] = None
    filename_tmpl: Annotated[str, Meta(description='Template that turns GT names into LQ names, e.g. {}x4.')] = '{}'
    io_backend: Annotated[dict[str, Any], Meta(description='type: disk or lmdb.')] = msgspec.field(
        default_factory=_disk
    )
    mean: Annotated[list[float] | None, Meta(description='Subtracted from each channel.')] = None
    std: Annotated[list[float] | None, Meta(description='Divides each channel.')] = None
    color: Annotated[Literal['y', 'rgb'] | None, Meta(description='y: luma only.')] = None
    use_shuffle: Annotated[bool, Meta(description='Accepted for compatibility with BasicSR; ignored.')] = True
    gt_size: Annotated[int, Meta(ge=1, description='Training: side of the GT patches in pixels.')] = 128
    use_hflip: Annotated[bool, Meta(description='Training: flip patches horizontally at random.')] = True
    use_rot: Annotated[bool, Meta(description='Training: rotate patches by multiples of 90 degrees at random.')] = True
    batch_size_per_gpu: Annotated[int, Meta(ge=1, description='Training: patches per step.')] = 1
    num_worker_per_gpu: Annotated[int, Meta(ge=0, description='Training: loader processes.')] = 0
    dataset_enlarge_ratio: Annotated[
        float, Meta(ge=1e-6, le=LARGEST, description='Training: passes over the images per epoch.')
    ] = 1
    prefetch_mode: Annotated[
        Literal['cpu', 'cuda'] | None, Meta(description='Load batches ahead; cuda also copies them to the GPU.')
    ] = None
    num_prefetch_queue: Annotated[int, Meta(ge=1, description='Batches to load ahead with prefetch_mode: cpu.')] = 1
    pin_memory: Annotated[bool, Meta(description='Use pinned memory with prefetch_mode: cuda.')] = False
    persistent_workers: Annotated[
        bool, Meta(description='Keep loader processes alive between epochs; not with prefetch_mode: cpu.')
    ] = False
    phase: Annotated[str, Meta(description='Set by BasicSR.')] = 'val'
    scale: Annotated[int, Meta(ge=1, description='Set by BasicSR.')] = 1


class PathOptions(Section, frozen=True, kw_only=True):
    """``path``: weights and states to start from. BasicSR decides where a run writes."""

    pretrain_network_g: Annotated[str | None, Meta(description='Weights of net_g to start from or to test.')] = None
    param_key_g: Annotated[
        str | None,
        Meta(
            description='Which weights of pretrain_network_g to load: params, params_ema, or null for weights without '
            'a key. If this is not given, params, params_ema and weights without a key are tried in this order; the '
            'log names the one used.'
        ),
    ] = 'params'
    strict_load_g: Annotated[bool, Meta(description='Whether the weights must match network_g exactly.')] = True
    pretrain_network_d: Annotated[str | None, Meta(description='Weights of the discriminator to start from.')] = None
    param_key_d: Annotated[str | None, Meta(description='Like param_key_g, for the discriminator.')] = 'params'
    strict_load_d: Annotated[bool, Meta(description='Whether the weights must match network_d exactly.')] = True
    pretrain_network_r: Annotated[
        str | None, Meta(description='Weights of a trained distortion relation network (DRN).')
    ] = None
    strict_load_r: Annotated[bool, Meta(description='Whether the weights must match network_r exactly.')] = True
    pretrain_camera_fit: Annotated[str | None, Meta(description='Saved camera fit (camera_fit.pth).')] = None
    pretrain_inner_rates: Annotated[
        str | None, Meta(description='Learned step sizes of the inner loop (drtl.inner.rate_lr).')
    ] = None
    resume_state: Annotated[
        str | None, Meta(description='Training state to resume from; --auto_resume finds the latest.')
    ] = None
    ignore_resume_networks: Annotated[
        str | list[str] | None, Meta(description='Networks whose weights are not reloaded when resuming.')
    ] = None


class TrainOptions(Section, frozen=True, kw_only=True):
    """``train``: schedule and losses, as in BasicSR."""

    total_iter: Annotated[int, Meta(ge=0, description='Number of training steps; not for DRTLAdaptModel.')]
    optim_g: Annotated[dict[str, Any], Meta(description="type: Adam, lr, and further arguments of torch's optimizer.")]
    scheduler: Annotated[
        dict[str, Any], Meta(description='type: MultiStepLR or CosineAnnealingRestartLR, and its arguments.')
    ]
    warmup_iter: Annotated[int, Meta(ge=-1, description='Steps over which the learning rate rises; -1: none.')] = -1
    ema_decay: Annotated[
        float, Meta(ge=0, le=1, description='Decay of the moving average of the weights; 0 turns it off.')
    ] = 0
    amp: Annotated[
        Literal['bf16'] | None, Meta(description='bf16: networks compute in bfloat16 on devices that support it.')
    ] = None
    compile: Annotated[bool, Meta(description='Compile net_g with torch.compile for training; not with maml.')] = False
    pixel_opt: Annotated[dict[str, Any] | None, Meta(description='type of the pixel loss, and its arguments.')] = None
    perceptual_opt: Annotated[
        dict[str, Any] | None,
        Meta(description='type: VGGPerceptualLoss, vgg_weights: FILE, and further arguments; nothing is downloaded.'),
    ] = None
    msssim_opt: Annotated[dict[str, Any] | None, Meta(description='type: MSSSIMLoss, loss_weight.')] = None
    frequency_opt: Annotated[dict[str, Any] | None, Meta(description='type: FFTLoss, loss_weight.')] = None
    gan_opt: Annotated[
        dict[str, Any] | None,
        Meta(
            description='type: GANLoss, and its arguments; requires network_d and optim_d. The weights of the tasks do '
            'not apply to this loss.'
        ),
    ] = None
    relativistic: Annotated[
        bool,
        Meta(
            description="Use ESRGAN's relativistic GAN loss, as ESRGANModel does, instead of the standard one (SRGAN, "
            'Real-ESRGAN).'
        ),
    ] = False
    optim_d: Annotated[
        dict[str, Any] | None,
        Meta(description='Optimizer of the discriminator, in training and adaptation; type: Adam, lr, ….'),
    ] = None
    net_d_iters: Annotated[int, Meta(ge=1, description='Training: steps of the discriminator per step of net_g.')] = 1
    net_d_init_iters: Annotated[
        int, Meta(ge=0, description='Training: steps of the discriminator before the first step of net_g.')
    ] = 0


class ValOptions(Section, frozen=True, kw_only=True):
    """``val``: validation during training, or the test."""

    val_freq: Annotated[int, Meta(ge=1, description='Training steps between two validations.')]
    save_img: Annotated[bool, Meta(description='Whether to write the restored images.')]
    suffix: Annotated[str | None, Meta(description='Test: suffix of the image names; null: the name of the run.')] = (
        None
    )
    metrics: Annotated[
        dict[str, Any] | None, Meta(description='Metrics by name: each has a type and its arguments.')
    ] = None
    pbar: Annotated[bool | None, Meta(description='Show a progress bar; null: only on a terminal.')] = None
    tile: Annotated[int, Meta(ge=0, description='Tile size in LQ pixels; 0: the whole image at once.')] = 0
    overlap: Annotated[int, Meta(ge=0, description='Padding on each side of a tile, in LQ pixels.')] = 16


class LoggerOptions(Section, frozen=True, kw_only=True):
    """``logger``: logging and checkpoints."""

    print_freq: Annotated[int, Meta(ge=1, description='Training steps between two lines of the log.')]
    save_checkpoint_freq: Annotated[int, Meta(ge=1, description='Training steps between two checkpoints.')]
    use_tb_logger: Annotated[bool, Meta(description='Whether to write TensorBoard logs.')]
    keep_checkpoints: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description='Number of latest checkpoints to keep, besides those with the best metrics; null: all.'),
    ] = None
    wandb: Annotated[dict[str, Any] | None, Meta(description='project and resume_id, for Weights & Biases.')] = None


class DistOptions(Section, frozen=True, kw_only=True):
    """``dist_params``: settings for several processes."""

    backend: Annotated[str | None, Meta(description='torch.distributed backend.')] = None
    port: Annotated[
        Annotated[int, Meta(ge=1, le=65535)] | None, Meta(description='Port of the first process (SLURM).')
    ] = None


class FileOptions(Section, frozen=True, kw_only=True):
    """The option file."""

    name: Annotated[str, Meta(description='Name of the run and of its folder in experiments/ or results/.')]
    model_type: Annotated[str, Meta(description='DRTLModel, DRTLAdaptModel, or a model of BasicSR.')]
    datasets: Annotated[dict[str, Any], Meta(description='train and val (val_2, …), or test_1, ….')]
    path: Annotated[dict[str, Any], Meta(description='Section: weights and states to start from.')]
    num_gpu: Annotated[
        Annotated[int, Meta(ge=0)] | Literal['auto'],
        Meta(description='Number of GPUs; auto: all available ones. DRTLModel uses one per process.'),
    ]
    scale: Annotated[int, Meta(ge=1, description='Upscaling factor.')] = 1
    manual_seed: Annotated[
        Annotated[int, Meta(ge=0, le=2**32 - 1)] | None,
        Meta(description='Seed of all random numbers; null: a random seed.'),
    ] = None
    network_g: Annotated[dict[str, Any] | None, Meta(description='type of the network, and its arguments.')] = None
    network_d: Annotated[dict[str, Any] | None, Meta(description='type of the discriminator, and its arguments.')] = (
        None
    )
    network_r: Annotated[
        dict[str, Any] | None, Meta(description='type of the distortion relation network (DRN), and its arguments.')
    ] = None
    drtl: Annotated[dict[str, Any] | None, Meta(description='Section: settings of this plug-in.')] = None
    train: Annotated[dict[str, Any] | None, Meta(description='Section: schedule and losses.')] = None
    val: Annotated[dict[str, Any] | None, Meta(description='Section: validation, or the test.')] = None
    logger: Annotated[dict[str, Any] | None, Meta(description='Section: logging and checkpoints.')] = None
    dist_params: Annotated[dict[str, Any] | None, Meta(description='Section: settings for several processes.')] = None
    find_unused_parameters: Annotated[
        bool, Meta(description="As in torch, for BasicSR's models in several processes. Not for DRTLModel.")
    ] = False


# Sections of an option file that BasicSR's models share with ours.
SECTIONS: dict[str, type[Section]] = {
    'path': PathOptions,
    'train': TrainOptions,
    'val': ValOptions,
    'logger': LoggerOptions,
    'dist_params': DistOptions,
}
# Options of a dataset that BasicSR sets and nobody writes.
SET_BY_BASICSR = frozenset({'phase', 'scale'})
