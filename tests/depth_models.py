"""Small depth estimators of transformers with random weights, as Hugging Face would host them."""

from pathlib import Path

import torch

from corun_ray.service.weights.folder import index_folder


def write_depth_model(folder: Path, kind: str = "relative") -> Path:
    """Writes a Depth Anything of 10,000 parameters; `kind` is `relative` or `metric`, or `glpn` for that network."""
    from transformers import (
        DepthAnythingConfig,
        DepthAnythingForDepthEstimation,
        Dinov2Config,
        DPTImageProcessor,
        GLPNConfig,
        GLPNForDepthEstimation,
        GLPNImageProcessor,
    )

    torch.manual_seed(0)
    if kind == "glpn":
        sides = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 8]}
        kernels = {"patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 1], "mlp_ratios": [1, 1]}
        network = GLPNForDepthEstimation(GLPNConfig(**sides, **kernels, decoder_hidden_size=8))
        processor = GLPNImageProcessor(size_divisor=32)
    else:
        backbone = Dinov2Config(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            mlp_ratio=1,
            image_size=56,
            patch_size=14,
            out_features=["stage1", "stage2"],
            reshape_hidden_states=False,
        )
        config = DepthAnythingConfig(
            backbone_config=backbone,
            reassemble_hidden_size=16,
            reassemble_factors=[1, 0.5],
            neck_hidden_sizes=[8, 8],
            fusion_hidden_size=8,
            head_hidden_size=8,
            depth_estimation_type=kind,
            max_depth=80,
        )
        network = DepthAnythingForDepthEstimation(config)
        # Random weights may leave nothing behind the last ReLU.
        torch.nn.init.constant_(network.head.conv3.bias, 1.0)
        size = {"height": 56, "width": 56}
        processor = DPTImageProcessor(size=size, keep_aspect_ratio=True, ensure_multiple_of=14, do_pad=False)

    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    index_folder(str(folder))
    return folder
