"""Draws data sets as people have them, of which something cannot be used."""

from pathlib import Path

import numpy as np

from tests.conftest import photograph, write_image


def haze(clear: np.ndarray) -> np.ndarray:
    return (0.5 * clear + 110).astype(np.uint8)


def damage(path: Path) -> None:
    """Keeps the first half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def draw_damaged_validation(root: Path, damaged: int = 1) -> Path:
    """Four clear images and their hazy ones; `damaged` of these, from the third on, are half a JPEG."""
    rng = np.random.default_rng(0)
    for number in range(4):
        clear = photograph(rng, 72, 96)
        write_image(root / f"clear/{number:04}.jpg", clear)
        write_image(root / f"hazy/{number:04}.jpg", haze(clear))
    for number in range(damaged):
        damage(root / f"hazy/{(2 + number) % 4:04}.jpg")
    return root


def draw_larger_truth(root: Path) -> Path:
    """Three hazy images, whose truths are 10 px larger on each side."""
    rng = np.random.default_rng(0)
    for number in range(3):
        clear = photograph(rng, 116, 148)
        write_image(root / f"gt/{number:04}.png", clear)
        write_image(root / f"hazy/{number:04}.png", haze(clear)[10:-10, 10:-10])
    return root


def draw_unusable_depth(root: Path, names: tuple[str, ...] = ()) -> Path:
    """Clear images and depth maps of every kind, or only those of `names`."""
    rng = np.random.default_rng(0)
    depth = np.linspace(0, 1, 72 * 96, dtype=np.float32).reshape(72, 96)
    maps = {
        "plain": depth,
        "trailing": depth[..., None],
        "nan": np.where(depth > 0.5, np.nan, depth),
        "constant": depth * 0 + 0.5,
        "turned": depth.T.copy(),
        "viewer": None,
    }
    (root / "depth").mkdir(parents=True)
    for name in names or maps:
        write_image(root / f"clear/{name}.jpg", photograph(rng, 72, 96))
        values = maps[name]
        if values is None:
            write_image(root / f"depth/{name}.jpg", photograph(rng, 72, 96))
        else:
            np.save(root / f"depth/{name}.npy", values)
    return root
