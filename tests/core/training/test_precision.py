"""Which precision is chosen, by facts about processors that need not be at hand."""

import pytest
import torch

from corun_ray.core.training import precision
from corun_ray.core.training.precision import (
    Bfloat16,
    Processor,
    choose_precision,
    judge_bfloat16,
    measure_slowdown,
    read_processor,
)

CPU = torch.device("cpu")
FAST, SLOW = Bfloat16(True, "AMX"), Bfloat16(False, "the processor has no fast bfloat16")


@pytest.mark.parametrize(
    ("processor", "text"),
    [
        (Processor(), "fp32 (auto: the processor has no fast bfloat16)"),
        (Processor(cpu_features=("AVX512-BF16",)), "bf16 (auto: AVX512-BF16)"),
        (Processor(cpu_features=("AMX", "AVX512-BF16")), "bf16 (auto: AMX)"),
        (
            Processor(cpu_features=("AMX", "AVX512-BF16"), is_held_back=True),
            "fp32 (auto: the environment keeps torch from the processor's AMX)",
        ),
        (Processor(cuda_capability=(7, 5)), "fp32 (auto: compute capability 7.5 has no fast bfloat16)"),
        (Processor(cuda_capability=(8, 0)), "bf16 (auto: compute capability 8.0)"),
        (Processor(cuda_capability=(9, 0)), "bf16 (auto: compute capability 9.0)"),
    ],
)
def test_auto_is_bf16_where_the_device_is_fast_at_it(processor: Processor, text: str) -> None:
    assert str(choose_precision("auto", judge_bfloat16(processor))) == text


@pytest.mark.parametrize("own", [FAST, SLOW])
def test_workers_that_differ_all_choose_fp32(own: Bfloat16) -> None:
    text = "fp32 (auto: no fast bfloat16 on 1 of 4 workers)"
    assert str(choose_precision("auto", own, num_slow=1, num_workers=4)) == text


def test_workers_that_are_alike_have_the_reason_of_each() -> None:
    assert str(choose_precision("auto", FAST, num_slow=0, num_workers=4)) == "bf16 (auto: AMX)"
    assert str(choose_precision("auto", SLOW, num_slow=4, num_workers=4)) == f"fp32 (auto: {SLOW.reason})"


def test_what_is_asked_for_is_what_is_used() -> None:
    for own in (FAST, SLOW):
        assert str(choose_precision("bf16", own, num_slow=1, num_workers=2)) == "bf16"
        assert str(choose_precision("fp32", own)) == "fp32"


def test_the_processor_s_flags_and_what_the_environment_leaves_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(flags: dict[str, bool], kernels: str, has_onednn: bool) -> Processor:
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda: flags)
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: kernels)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_onednn)
        return read_processor(CPU)

    # oneDNN says yes to AVX-512 without instructions for bfloat16.
    assert read({"avx512_f": True, "avx512_bf16": False}, "AVX512", True) == Processor()
    assert read({"avx2": True}, "AVX2", False) == Processor()
    flags = {"avx512_bf16": True, "amx_bf16": True}
    assert read(flags, "AVX512", True) == Processor(cpu_features=("AMX", "AVX512-BF16"))
    assert read(flags, "AVX2", True).is_held_back and read(flags, "AVX512", False).is_held_back


def test_a_gpu_has_its_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    assert read_processor(torch.device("cuda:1")) == Processor(cuda_capability=(9, 0))


def test_the_slowdown_is_the_ratio_of_the_least_times(monkeypatch: pytest.MonkeyPatch) -> None:
    # The clock stands still but for the product: 3 s each in bfloat16, in float32 2 s and once, by chance, 1 s.
    monkeypatch.setattr(precision, "MEASURING_S", 4.0)
    spans_s = iter([9.0, 3.0, 3.0, 9.0, 2.0, 1.0, 2.0])
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def wait(device: torch.device) -> None:
        now[0] += next(spans_s)

    monkeypatch.setattr(precision, "synchronize", wait)
    threads = torch.get_num_threads()
    assert measure_slowdown(CPU) == 3.0
    assert next(spans_s, None) is None and torch.get_num_threads() == threads
