"""The wording of mistakes: each in one plain line that names its key."""

from pathlib import Path

import pytest

from corun_ray.config.jobs import KINDS, TrainingJob
from corun_ray.config.loading import JobFileError
from corun_ray.config.reference import find_section, list_keys
from tests.jobtexts import COLABATOR, DEHAZE, DEPTH, EVALUATE, PIPELINE, PRETRAIN, SERVE, TUNE, load, mistakes


def test_five_mistakes_are_five_lines(tmp_path: Path) -> None:
    text = """
kind: pretrian
name: five
network: {stages: 1}
optim: {learning_rate: 1e-4}
train: {steps: many}
"""
    assert mistakes(tmp_path, text) == [
        'kind: "pretrian" is not one of pretrain, colabator, tune, evaluate, dehaze, depth, serve '
        "(did you mean pretrain?)",
        "data.clear: missing (folder, pack or URI of clear images; or give data.paired)",
        "network.stages: 1 is too few (at least 2)",
        "optim.learning_rate: unknown key (did you mean optim.lr?)",
        'train.steps: "many" is not a whole number',
    ]


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ("network: {stages: 17}", "network.stages: 17 is too many (at most 16)"),
        (
            "network: {start: published, init: corun-small}",
            "network.start: published, but the job starts from network.init (corun-small)",
        ),
        ("network: {type: NAFNet, start: published}", "network.start: only used by corun, not by NAFNet"),
        ("coherence: {antialias: false}", "coherence.antialias: only used by daclip, not by contrast"),
        ("network: {width: 31}", "network.width: 31 is not a multiple of 2"),
        (
            "network: {type: NAFnet}",
            'network.type: "NAFnet" is neither corun, an architecture of spandrel nor module.path:ClassName '
            "(did you mean NAFNet?)",
        ),
        ("pool: {shards: 400}", "pool.shards: 400 is too many (at most 256)"),
        ("loss: {perceptual: vgg19}", "loss.weights: missing (perceptual vgg19 needs its weights)"),
        ("loss: {perceptual: lpips}", 'loss.perceptual: "lpips" is not one of none, laplacian, vgg19'),
        ("optim: {lr: 0}", "optim.lr: 0 is too small (more than 0)"),
        ("optim: {ema: 1}", "optim.ema: 1 is too large (less than 1)"),
        ("optim: {compile: yes}", 'optim.compile: "yes" is not true or false'),
        ("optim: {lr: 1e-7, min_lr: 1e-6}", "optim.min_lr: 1e-06 is more than optim.lr (1e-07)"),
        ("train: {steps: 2.5}", "train.steps: 2.5 is not a whole number"),
        ("train: {steps: true}", "train.steps: true is not a whole number"),
        ("train: 20", "train: 20 is not a mapping of keys"),
        ("haze: {beta: [2.8, 0.2]}", "haze.beta: [2.8, 0.2] is in the wrong order (low first)"),
        ("haze: {beta: [1]}", "haze.beta: [1] is too short ([low, high])"),
        ("haze: {beta: [1, 2, 3]}", "haze.beta: [1, 2, 3] is too long ([low, high])"),
        ("haze: {beta: 1}", "haze.beta: 1 is not a list"),
        ("haze: {airlight: [0.5, 1.5]}", "haze.airlight: 1.5 is too large (at most 1)"),
        ("haze: {density_variation: [0, 1.5]}", "haze.density_variation: 1.5 is too large (at most 1)"),
        ("haze: {nearest: [-0.1, 0.5]}", "haze.nearest: -0.1 is too small (at least 0)"),
        ("haze: {airlight_tint: .inf}", 'haze.airlight_tint: ".inf" is not a number'),
        ("haze: {airlight_tint: 1e999}", "haze.airlight_tint: Infinity is not a number"),
        ("tracking: {experiment: ''}", "tracking.experiment: empty"),
        ("storage: s3://a/b", "tracking.uri: needed because storage s3://a/b is not a folder"),
        (
            "coherence: {clarity: reference, quality: clean}",
            "coherence.quality: clean, but clarity reference (reference rates both)",
        ),
        (
            "coherence: {clarity: contrast, quality: reference}",
            "coherence.quality: reference, but clarity contrast (reference rates both)",
        ),
        (
            "coherence: {clarity: reference, share_blocks: true}",
            "coherence.share_blocks: not used by reference, which rates whole images",
        ),
        ("coherence: {precision: fp16}", "coherence.precision: fp16 (only used by daclip and musiq)"),
        (
            "cluster: {gpus_per_worker: 1}\ncoherence: {gpu: [graphs]}",
            "coherence.gpu: graphs (only used by daclip and musiq)",
        ),
        ("coherence: {gpu: [stream]}", "coherence.gpu: stream, but cluster.gpus_per_worker is 0"),
        (
            "coherence: {clarity: reference}\nnetwork: {init: corun-small}",
            "coherence.clarity: reference compares with corun-small, where network.init starts: the first labels "
            "would never be replaced",
        ),
        (
            "coherence: {clarity: reference}\nloss: {haze_density_weight: 0.1}",
            "loss.haze_density_weight: not used with reference; daclip, contrast and dark_channel have a gradient "
            "for it",
        ),
        ("coherence: {block_px: 40}", "data.patch_px: 288 is not a multiple of coherence.block_px (40)"),
        ("evaluate: {hazy: a}", "evaluate: not used by a colabator job"),
        ("lr: 1", "lr: unknown key (did you mean optim.lr?)"),
        ("trian: {}", "trian: unknown key (did you mean train?)"),
        ("cluster: {stages: 3}", "cluster.stages: unknown key (did you mean network.stages?)"),
        ("cluster: {gpus: 3}", "cluster.gpus: unknown key (did you mean cluster.gpus_per_worker?)"),
        ("cluster: {colour: 3}", "cluster.colour: unknown key"),
        ("seed: 1\nseed: 2", "seed: given twice (again in line 5)"),
    ],
)
def test_one_mistake_is_one_line(tmp_path: Path, section: str, line: str) -> None:
    assert mistakes(tmp_path, COLABATOR + section) == [line]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (PRETRAIN + "pool: {}\ncoherence:", [
            "coherence: not used by a pretrain job", "pool: not used by a pretrain job"]),
        ("kind: pretrain\nname: p\ndata: {clear: a, hazy: b}", ["data.hazy: not used by a pretrain job"]),
        (EVALUATE + "optim: {lr: 1}", ["optim: not used by an evaluate job"]),
        ("kind: colabator\nname: c", [
            "data.clear: missing (folder, pack or URI of clear images; or give data.paired)",
            "data.hazy: missing (folder, pack or URI of real hazy images)"]),
        ("kind: evaluate", [
            "name: missing (lower-case letters, digits and . _ -, starting with a letter or digit)",
            "evaluate.hazy: missing (folder or URI of hazy images)"]),
        ("kind: polish\nname: Tune\npolish: {}\ntrain: {steps: x}", [
            'kind: "polish" is not one of pretrain, colabator, tune, evaluate, dehaze, depth, serve',
            'name: "Tune" is not a name (lower-case letters, digits and . _ -, starting with a letter or digit)',
            'train.steps: "x" is not a whole number',
            "polish: unknown key"]),
        ("name: n\ndata: {hazy: b, cleer: a}", [
            "kind: missing (pretrain, colabator, tune, evaluate, dehaze, depth, serve)",
            "data.cleer: unknown key (did you mean data.clear?)"]),
        (EVALUATE.replace("hazy: hazy", "hazy: a, boxes: b"), [
            "evaluate.boxes: only used together with evaluate.detector"]),
        (EVALUATE.replace("hazy: hazy", "hazy: a, weights: w, detector: ssd300_vgg16"), [
            "evaluate.boxes: missing (a detector needs true boxes: VOC's folder or COCO's .json)"]),
        (EVALUATE.replace("hazy: hazy", "hazy: a, boxes: b, detector: ssd300_vgg16"), [
            "evaluate.weights: missing (detector ssd300_vgg16 needs its weights)"]),
        (EVALUATE.replace("hazy: hazy", "hazy: a, weights: w, boxes: b, detector: ssd300_vgg16, "
                          "detector_classes: [car]"), [
            "evaluate.detector_file: missing (torchvision's own file has COCO's classes)"]),
        (EVALUATE.replace("hazy: hazy", "hazy: a, box_classes: ['a/b']"), [
            'evaluate.box_classes: "a/b" is not a name of letters, digits, blanks and . _ -']),
        ("kind: evaluate\nname: e\nevaluate: {hazy: a, metrics: [psnr, ssim]}", [
            "evaluate.metrics: psnr and ssim cannot be measured without evaluate.clear"]),
        ("kind: evaluate\nname: e\nevaluate: {hazy: a, metrics: [fad], models: {a.b: 3, c: ''}}", [
            "evaluate.models.a.b: 3 is not text",
            "evaluate.models.c: empty",
            'evaluate.metrics: "fad" is neither of psnr, ssim, fade nor a metric of pyiqa for images '
                "(did you mean fade?)"]),
        ("kind: dehaze\nname: d\ndehaze: {input: a, output: b, model: m, stages: true, self_ensemble: true}", [
            "dehaze.stages: not with self_ensemble: stages are those of one restoration, not of eight"]),
    ],
)  # fmt: skip
def test_mistakes_by_kind(tmp_path: Path, text: str, lines: list[str]) -> None:
    assert mistakes(tmp_path, text) == lines


@pytest.mark.parametrize("value", ["{a: 1}", "[[1]]", "'~!'", "-1.5", "true", "1e999", '""'])
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_value_is_told_of_its_key(tmp_path: Path, kind: str, value: str) -> None:
    """Any value at any key is either accepted or refused in one line that names the key."""
    texts = {"pretrain": PRETRAIN, "colabator": COLABATOR, "tune": TUNE}
    text = (texts | {"evaluate": EVALUATE, "dehaze": DEHAZE, "depth": DEPTH, "serve": SERVE})[kind]
    told = 0
    for path, field in list_keys(KINDS[kind]).items():
        if find_section(field) or path == "kind":
            continue
        try:
            validation = ["data.validation.hazy=h"] if issubclass(KINDS[kind], TrainingJob) else []
            if path.startswith("data.paired."):
                validation += ["data.clear=null", "data.paired.hazy=h", "data.paired.clear=c"]
            load(tmp_path, text, *validation, f"{path}={value}")
        except JobFileError as error:
            told += 1
            assert all(line.startswith(path) and ": " in line for line in error.lines), error.lines
    assert told >= 4


def test_mistakes_of_a_pipeline_name_the_job(tmp_path: Path) -> None:
    unnamed = EVALUATE.replace("name: e\n", "")
    text = f"{PRETRAIN}seed: x\n---\n{COLABATOR}sed: 1\n---\n{unnamed}---\n{EVALUATE}"
    assert mistakes(tmp_path, text) == [
        'job p: seed: "x" is not a whole number',
        "job c: sed: unknown key (did you mean seed?)",
        "job 3: name: missing (lower-case letters, digits and . _ -, starting with a letter or digit)",
    ]
    assert mistakes(tmp_path, f"{PRETRAIN}---\n{PRETRAIN}seed: x") == [
        'job 2: name: "p" is the name of job 1 as well',
        'job 2: seed: "x" is not a whole number',
    ]
    assert mistakes(tmp_path, PIPELINE, "e:train.steps=3", "sed=4") == [
        "sed: unknown key (did you mean seed?)",
        "job e: train: not used by an evaluate job",
    ]


def test_a_mistake_shows_no_credentials(tmp_path: Path) -> None:
    (line,) = mistakes(tmp_path, f"{PRETRAIN}storage: ['s3://AKIA:word@bucket/runs']\n")
    assert line == 'storage: ["s3://***@bucket/runs"] is not text'
