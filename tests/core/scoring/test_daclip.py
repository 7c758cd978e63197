import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from corun_ray.core.choices import DEGRADATIONS
from corun_ray.core.scoring.coherence import Coherence
from corun_ray.core.scoring.daclip import DACLIP_FILE, DaClip, crop_middle_square, load_daclip
from corun_ray.core.weights import WeightsError
from tests import DATA
from tests.core.golden import golden_state_dict

WRAPPINGS: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "plain": lambda tensors: tensors,
    "state_dict": lambda tensors: {"epoch": 3, "state_dict": tensors},
    "module": lambda tensors: {"state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}},
}


def published(clip: torch.nn.Module) -> dict[str, Tensor]:
    """The published file's tensors, its controller being the visual tower of `clip` and its frozen tower unusable."""
    tensors = {"logit_scale": torch.tensor(4.0)}
    for name, tensor in clip.state_dict().items():
        tensors[f"clip.{name}"] = tensor
        if name.startswith("visual."):
            deeper = name.replace("transformer.", "transformer.transformer.").replace("visual.", "visual_control.")
            tensors[deeper] = tensor
            tensors[name] = tensors[f"clip.{name}"] = torch.full_like(tensor, torch.nan)
    tensors["visual_control.transformer.zero_modules.0.weight"] = torch.full((64, 64), torch.nan)
    return tensors


@pytest.fixture(scope="module")
def clip() -> Any:
    """open_clip's own CLIP, tiny, with random weights in every place: embeds 16 px images and words in 48 values."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=3, width=128, head_width=64, patch_size=4, image_size=16)
    text = CLIPTextCfg(context_length=12, vocab_size=49408, width=64, heads=1, layers=2)
    model = CLIP(48, vision, text)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


@pytest.fixture(scope="module")
def tensors(clip: Any) -> dict[str, Tensor]:
    return published(clip)


@pytest.fixture(scope="module")
def file(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("daclip") / DACLIP_FILE
    torch.save(tensors, path)
    return path


@pytest.fixture(scope="module")
def model(file: Path) -> DaClip:
    return load_daclip(file)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(5, 3, 41, 30, generator=torch.Generator().manual_seed(1))


def reference_cosines(clip: Any, images: Tensor) -> Tensor:
    """With open_clip's towers, tokenizer and normalisation constants, and torchvision's preprocessing."""
    import open_clip
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize

    prepare = Compose(
        [
            Resize(16, InterpolationMode.BICUBIC, antialias=True),
            CenterCrop(16),
            Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD),
        ]
    )
    words = open_clip.tokenize(list(DEGRADATIONS), context_length=12)
    return clip.encode_image(prepare(images), normalize=True) @ clip.encode_text(words, normalize=True).T


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_the_published_file_rates_as_open_clips_own_towers_do(
    wrapping: str, clip: Any, tensors: dict[str, Tensor], images: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / DACLIP_FILE
    torch.save(WRAPPINGS[wrapping](tensors), path)
    expected = reference_cosines(clip, images)
    assert expected.std(1).min() > 0.05, "the words must differ for this to prove anything"
    torch.testing.assert_close(load_daclip(path).compute_cosines(images), expected, rtol=0, atol=1e-5)


def test_half_precision_files_are_rated_in_single_precision(
    tensors: dict[str, Tensor], model: DaClip, images: Tensor, tmp_path: Path
) -> None:
    torch.save({name: tensor.half() for name, tensor in tensors.items()}, tmp_path / DACLIP_FILE)
    cosines = load_daclip(tmp_path / DACLIP_FILE).compute_cosines(images)
    assert cosines.dtype == torch.float32
    torch.testing.assert_close(cosines, model.compute_cosines(images), rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("height", "width", "side"),
    [(96, 96, 224), (32, 32, 32), (301, 200, 64), (50, 333, 64), (41, 30, 224), (7, 8, 16), (19, 16, 16), (16, 21, 16)],
)
def test_the_preprocessing_is_torchvisions(height: int, width: int, side: int) -> None:
    from torchvision.transforms.functional import InterpolationMode, center_crop, resize

    images = torch.rand(2, 3, height, width)
    expected = center_crop(resize(images, [side], InterpolationMode.BICUBIC, antialias=True), [side, side])
    torch.testing.assert_close(crop_middle_square(images, side), expected, rtol=0, atol=1e-6)


def test_density_adds_the_chosen_probabilities(file: Path, model: DaClip, images: Tensor) -> None:
    probabilities = model.compute_probabilities(images)
    torch.testing.assert_close(probabilities, (100 * model.compute_cosines(images)).softmax(1))
    torch.testing.assert_close(model.compute_density(images), probabilities[:, 1])
    torch.testing.assert_close(model(images), 1 - probabilities[:, 1])
    two = load_daclip(file, ["snowy", "low-light"])
    torch.testing.assert_close(two.compute_density(images), probabilities[:, 3] + probabilities[:, 8])


def test_all_degradations_together_leave_no_clarity_and_never_less(file: Path, images: Tensor) -> None:
    clarity = load_daclip(file, DEGRADATIONS)(images)
    assert clarity.dtype == torch.float32 and clarity.shape == (5,)
    assert clarity.min() >= 0 and clarity.max() < 1e-5


@pytest.mark.parametrize(
    ("words", "found"), [(["hazy", "foggy"], "got 'foggy'"), ([], "got none"), ("hazy", "got 'h'")]
)
def test_unknown_degradations_are_refused(file: Path, words: Any, found: str) -> None:
    with pytest.raises(ValueError, match=f"expected some of {', '.join(DEGRADATIONS)}, {found}"):
        load_daclip(file, words)


def test_chunks_change_nothing_but_how_many_images_are_rated_at_a_time(
    file: Path, model: DaClip, images: Tensor
) -> None:
    chunked = load_daclip(file, chunk_images=2)
    rated: list[int] = []
    chunked.tower.register_forward_hook(lambda _, inputs, __: rated.append(len(inputs[0])))
    torch.testing.assert_close(chunked.compute_cosines(images), model.compute_cosines(images), rtol=0, atol=1e-5)
    assert rated == [2, 2, 1]


def test_the_gradient_reaches_the_images_alone(model: DaClip, images: Tensor) -> None:
    images.requires_grad_()
    model.compute_density(images).sum().backward()
    assert images.grad is not None and images.grad.flatten(1).abs().sum(1).min() > 0
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_only_the_controller_and_the_embedded_words_are_kept(clip: Any, model: DaClip) -> None:
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == sum(parameter.numel() for parameter in clip.visual.parameters())
    assert model.words.shape == (10, 48)
    torch.testing.assert_close(model.words.norm(dim=1), torch.ones(10))


def test_the_trainers_mixed_precision_does_not_reach_the_scores(model: DaClip, images: Tensor) -> None:
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(images), expected, rtol=0, atol=0)


def test_loading_draws_no_random_numbers(file: Path) -> None:
    before = torch.get_rng_state()
    load_daclip(file)
    assert torch.equal(before, torch.get_rng_state())


def test_it_rates_blocks_for_coherence(model: DaClip, images: Tensor) -> None:
    cropped = images[..., :40, :]
    blocks = Coherence(clarity=model, block_px=10).score_blocks(cropped, cropped)
    assert blocks.clarity.shape == (5, 4, 3)
    expected = model(images[2:3, :, 10:20, 20:30])
    torch.testing.assert_close(blocks.clarity[2, 1, 2], expected[0], rtol=0, atol=1e-4)


class Code:
    """What a pickle would run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_code_in_a_file_is_refused_and_not_run(
    save: Callable[[Any, Path], Any], tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    save({"state_dict": {"logit_scale": tensors["logit_scale"]}, "extra": Code(ran)}, tmp_path / DACLIP_FILE)
    with pytest.raises(WeightsError, match="holds objects of the class|not a file of plain tensors"):
        load_daclip(tmp_path / DACLIP_FILE)
    assert not ran.exists()


Tensors = dict[str, Tensor]
FIRST_BLOCK = "visual_control.transformer.transformer.resblocks.0"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: [1, 2], r"holds a list, expected named tensors"),
        (lambda t: {"params": t}, r"no visual_control\.conv1\.weight"),
        (lambda t: {k: v for k, v in t.items() if "control" not in k}, r"no visual_control\.conv1\.weight"),
        (lambda t: {k: v for k, v in t.items() if not k.startswith("clip.")}, r"no clip\.positional_embedding"),
        (lambda t: {k: v for k, v in t.items() if FIRST_BLOCK not in k}, rf"no {FIRST_BLOCK}\.ln_1\.weight"),
        (lambda t: {k: v for k, v in t.items() if k != f"{FIRST_BLOCK}.attn.in_proj_bias"}, r"no .*\.in_proj_bias"),
        (lambda t: {k: v for k, v in t.items() if k != "clip.ln_final.bias"}, r"no clip\.ln_final\.bias"),
        (lambda t: t | {"visual_control.proj": torch.ones(3)}, r"proj has shape \(3,\), expected 2 dimensions"),
        (lambda t: t | {"visual_control.ln_pre.bias": torch.ones(3)}, r"ln_pre\.bias has shape \(3,\), not \(128,\)"),
        (lambda t: t | {"clip.token_embedding.weight": torch.ones(9, 64)}, r"shape \(9, 64\), not \(49408, 64\)"),
        (lambda t: t | {"clip.text_projection": torch.ones(64, 9)}, r"embeds words in 9, images in 48\)"),
        (lambda t: t | {"clip.positional_embedding": torch.ones(12, 65)}, r"width 65, no multiple of 64"),
    ],
)
def test_a_wrong_file_is_told_in_one_line(
    change: Callable[[Tensors], Any], reason: str, tensors: Tensors, tmp_path: Path
) -> None:
    path = tmp_path / DACLIP_FILE
    torch.save(change(tensors), path)
    with pytest.raises(WeightsError, match=reason) as caught:
        load_daclip(path)
    assert str(caught.value).startswith(f"{path}: not DA-CLIP (")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such file"):
        load_daclip(tmp_path / DACLIP_FILE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_half_precision_on_cuda_rates_as_the_cpu_does(file: Path, images: Tensor) -> None:
    expected = load_daclip(file).compute_cosines(images)
    found = load_daclip(file).cuda().compute_cosines(images.cuda())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=5e-3)


def golden_daclip() -> Tensors:
    """The published names at full size: golden weights where the scorer reads, zeros of no size on disk elsewhere."""
    shapes = {
        name: tuple(shape) for name, shape in json.loads((DATA / "daclip" / "daclip_keys.json").read_text()).items()
    }
    read = {
        name: shape
        for name, shape in shapes.items()
        if shape and not name.startswith(("clip.visual.", "visual.")) and "zero_modules" not in name
    }
    golden = golden_state_dict(read)
    for name, tensor in golden.items():
        if name.endswith(".weight") and tensor.ndim == 1:  # layer norms scale by one and a little
            golden[name] = 1 + 10 * tensor
    return {name: golden.get(name, torch.zeros(()).expand(shape)) for name, shape in shapes.items()}


@pytest.mark.slow
def test_the_full_size_gives_the_golden_cosines_in_each_wrapping(tmp_path: Path) -> None:
    with np.load(DATA / "daclip" / "daclip_vitb32.npz") as golden:
        images, cosine, probs = (torch.from_numpy(golden[name]) for name in ("input", "cosine", "probs"))
    tensors = golden_daclip()
    assert len(tensors) == 631
    for name, wrap in WRAPPINGS.items():
        path = tmp_path / name / DACLIP_FILE
        path.parent.mkdir()
        torch.save(wrap(tensors), path)
        model = load_daclip(path)
        path.unlink()
        with torch.no_grad():
            found, shares = model.compute_cosines(images), model.compute_probabilities(images)
        print(f"{name}: cosines to {(found - cosine).abs().max():.1e}, probs to {(shares - probs).abs().max():.1e}")
        torch.testing.assert_close(found, cosine, rtol=0, atol=1e-3)
        torch.testing.assert_close(shares, probs, rtol=0, atol=1e-3)


def test_the_resize_without_antialiasing_is_plain_bicubic(file: Path) -> None:
    images = torch.rand(2, 3, 60, 80, generator=torch.Generator().manual_seed(0))
    plain = F.interpolate(images, (30, 40), mode="bicubic", align_corners=False)[..., 5:35]
    torch.testing.assert_close(crop_middle_square(images, 30, antialias=False), plain)
    assert crop_middle_square(images, 30).std() < 0.8 * plain.std()

    # The scorer resizes as it is told.
    cosines = [load_daclip(file, antialias=antialias).compute_cosines(images) for antialias in (True, False)]
    assert not torch.equal(*cosines)
