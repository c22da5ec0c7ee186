"""`benchmarks/step_kernels.py`: groups of kernels, and what it counts as idle."""

import pytest
from step_kernels import Kernel, find_group, summarize_kernels


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("nvjet_tst_64x128_64x5_2x1_v_bz_TNT", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_tn_align8>", "matrix products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16, float>", "matrix products"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("triton_red_fused_add_mean_mul_pow_rsqrt_2", "norms, activations, RoPE, and sums: compiled by Inductor"),
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>",
            "optimizer, clipping, copies of the adapters",
        ),
        ("Memcpy DtoD (Device -> Device)", "other copies and fills"),
        ("void at::native::indexFuncSmallIndex<float>", "other kernels"),
    ],
)
def test_find_group(kernel: str, group: str) -> None:
    assert find_group(kernel) == group


def test_groups_and_idle_time_add_up_to_the_step() -> None:
    """Two steps of 100 µs by the clock: 2 µs idle between two kernels, an overlap of 5 µs, 40 µs idle later."""
    kernels = [
        Kernel("nvjet_a", 0, 40),
        Kernel("triton_b", 42, 60),
        Kernel("flash_c", 55, 70),
        Kernel("nvjet_a", 110, 150),
    ]
    rows = {row["group"]: row for row in summarize_kernels(kernels, 200e-6, 2)}
    assert {group: (row["kernels"], row["milliseconds"], row["share"]) for group, row in rows.items()} == {
        "a step": (2.0, 0.1, "100.0%"),
        "norms, activations, RoPE, and sums: compiled by Inductor": (0.5, 0.01, "9.0%"),
        "attention": (0.5, 0.01, "5.0%"),
        "matrix products": (1.0, 0.04, "40.0%"),
        "idle up to 10 µs, between kernels": ("", 0.0, "1.0%"),
        "idle longer, waiting for the CPU": ("", 0.04, "45.0%"),
    }
    assert rows["a step"]["longest_gaps"] == [{"between": "flash_c -> nvjet_a", "milliseconds": 0.02}]
    assert rows["a step"]["longest_kernels"][0] == {"kernel": "nvjet_a", "calls": 1.0, "milliseconds": 0.04}


def test_no_kernels_leave_the_step_idle() -> None:
    rows = summarize_kernels([], 1e-3, 1)
    assert [(row["group"], row["milliseconds"]) for row in rows] == [
        ("a step", 1.0),
        ("idle up to 10 µs, between kernels", 0.0),
        ("idle longer, waiting for the CPU", 1.0),
    ]
