"""Planted bugs: changes to the kernels' source text that the checks must catch."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from emulation.building import CSRC


@dataclass(frozen=True)
class Mutant:
    """A bug: `old` in `file` becomes `new`, and the checks whose names start with `caught_by` must fail."""

    name: str
    file: str
    old: str
    new: str
    caught_by: str

    @property
    def kernel(self) -> str:
        """The file to recompile, which contains the kernels that the check runs. The bug may be in a header of it."""
        return f"{self.caught_by.partition('/')[0]}.cu"


MUTANTS = (
    Mutant(
        "float8_nan_read_as_number",
        "core/float8.h",
        "0x1p+120f, 480.0f)",
        "0x1p+120f, 512.0f)",
        "grad_stats/every_number/e4m3",
    ),
    Mutant(
        "missing_barrier",
        "cuda/device.cuh",
        "  __syncthreads();\n  Stats all",
        "  Stats all",
        "grad_stats/boundaries/f32",
    ),
    Mutant(
        "wrong_lane_mask",
        "cuda/device.cuh",
        "kAllLanes = 0xffffffffu",
        "kAllLanes = 0x0000ffffu",
        "grad_stats/boundaries/f32",
    ),
    Mutant(
        "divergent_shuffle",
        "cuda/device.cuh",
        "if (threadIdx.x < kWarp) {",
        "if (threadIdx.x < kWarp - 1) {",
        "grad_stats/boundaries/f32",
    ),
    Mutant(
        "warps_left_out",
        "cuda/device.cuh",
        "+ kWarp; t < kThreads;",
        "+ kWarp; t < kThreads - kWarp;",
        "grad_stats/boundaries/f32",
    ),
    Mutant(
        "tail_off_by_one",
        "cuda/grad_stats.cu",
        "thread < split.tail",
        "thread + 1 < split.tail",
        "grad_stats/boundaries/f16",
    ),
    Mutant("head_counted_twice", "cuda/grad_stats.cu", "begin + split.head;", "begin;", "grad_stats/misaligned/f64"),
    Mutant(
        "misaligned_vector_load", "cuda/device.cuh", "past == 0 ? 0 :", "past != 4 ? 0 :", "grad_stats/misaligned/bf16"
    ),
    Mutant("dropped_last_chunk", "core/chunks.h", " + (numel % chunk_numel != 0)", "", "grad_stats/boundaries/f32"),
    Mutant(
        "chunk_past_the_end",
        "core/chunks.h",
        "(left < chunk_numel ? left : chunk_numel)",
        "chunk_numel",
        "grad_stats/boundaries/f64",
    ),
    Mutant(
        "unrolled_loop_overruns",
        "cuda/grad_stats.cu",
        "v + (kLoads - 1) * kThreads <",
        "v + (kLoads - 2) * kThreads <",
        "grad_stats/boundaries/f16",
    ),
    Mutant(
        "vector_dropped",
        "cuda/grad_stats.cu",
        "for (; v < split.n_vectors; v",
        "for (; v + 1 < split.n_vectors; v",
        "grad_stats/boundaries/f32",
    ),
    Mutant(
        "swapped_statistics",
        "core/stats.h",
        "row[kSum] = stats.sum;",
        "row[kSum] = stats.sum_abs;",
        "grad_stats/boundaries/f32",
    ),
    Mutant("nan_lost_in_max", "core/stats.h", "(a > b || a != a) ? a : b", "a > b ? a : b", "grad_stats/extremes/f32"),
    Mutant(
        "squares_underflow", "core/stats.h", "kFastMin = 0x1p-55f", "kFastMin = 0x1p-148f", "grad_stats/extremes/f32"
    ),
    Mutant(
        "squares_overflow", "core/stats.h", "kFastMax = 0x1p+55f", "kFastMax = 0x1p+127f", "grad_stats/extremes/bf16"
    ),
    Mutant(
        "rescaled_too_little",
        "core/stats.h",
        "kRescale = 0x1p+96f",
        "kRescale = 0x1p+60f",
        "grad_stats/extremes/f32",
    ),
    Mutant(
        "rescaled_the_wrong_way",
        "cuda/thread_sums.cuh",
        "is_small ? kRescale : 1 / kRescale",
        "is_small ? 1 / kRescale : kRescale",
        "grad_stats/extremes/bf16",
    ),
    Mutant(
        "squares_rescaled_like_sums",
        "cuda/thread_sums.cuh",
        "fast.sum_sq * (unit * unit)",
        "fast.sum_sq * unit",
        "grad_stats/extremes/f32",
    ),
    Mutant(
        "zero_in_half_of_a_pair_missed",
        "cuda/thread_sums.cuh",
        "__hbgt2(x, Pair{})",
        "__low2float(x) > 0.0f",
        "grad_stats/boundaries/bf16",
    ),
    Mutant(
        "half_of_a_pair_not_in_the_maximum",
        "cuda/thread_sums.cuh",
        "fmaxf(__low2float(x), __high2float(x))",
        "__low2float(x)",
        "grad_stats/boundaries/f16",
    ),
    Mutant(
        "smallest_magnitude_of_the_first_pair_only",
        "cuda/thread_sums.cuh",
        "abs_min = smaller(abs_min, magnitude(lane));",
        "",
        "grad_stats/boundaries/f32",
    ),
    Mutant(
        "nan_lost_by_a_thread",
        "cuda/thread_sums.cuh",
        "sum_abs != sum_abs ? sum_abs : largest(abs_max)",
        "largest(abs_max)",
        "grad_stats/extremes/f16",
    ),
    Mutant(
        "nonfinite_elements_not_counted_in_groups",
        "cuda/thread_sums.cuh",
        "n_nonfinite += !is_finite(x[i]);",
        "",
        "residual_add/forward/f32",
    ),
    Mutant(
        "second_half_of_a_group_lost",
        "cuda/thread_sums.cuh",
        "merge(fast_sums<0, n / 2>(x), fast_sums<n / 2, n>(x))",
        "fast_sums<0, n / 2>(x)",
        "grad_stats/boundaries/f16",
    ),
    Mutant(
        "bins_ignored",
        "core/stats.h",
        "return exponent == 0 ? 1.0 : exponent > 0 ? 0x1p-600 : 0x1p+600;",
        "return 1.0;",
        "grad_stats/extremes/f64",
    ),
    Mutant(
        "int32_index",
        "cuda/table.cuh",
        "(table.data[tensor]) + chunk.begin",
        "(table.data[tensor]) + static_cast<int>(chunk.begin)",
        "grad_stats/beyond_int32",
    ),
    Mutant(
        "a_load_of_partials_lost",
        "cuda/finish.cuh",
        "for (int l = 0; l < kPartialLoads; ++l) mine",
        "for (int l = 1; l < kPartialLoads; ++l) mine",
        "grad_stats/many_chunks",
    ),
    Mutant(
        "launch_overwrites_partials",
        "cuda/grad_stats.cu",
        "partials + chunks_done,",
        "partials,",
        "grad_stats/many/3000",
    ),
    Mutant(
        "finish_before_sums",
        "cuda/grad_stats.cu",
        "        if (const cudaError_t error = flush()) return error;\n        if",
        "        if",
        "grad_stats/many/3000-mostly-empty",
    ),
    Mutant(
        "empty_row_unwritten",
        "cuda/grad_stats.cu",
        "if (n_chunks != 1) {",
        "if (n_chunks > 1) {",
        "grad_stats/boundaries/f32",
    ),
    Mutant(
        "row_truncated", "cuda/table.cuh", " && row_span >= 0 && row_span <= 0xffff", "", "grad_stats/scattered_rows"
    ),
    Mutant(
        "scratch_forgotten",
        "cuda/grad_stats.cu",
        "any_merged |= n_chunks > 1",
        "any_merged = n > n_tensors",
        "grad_stats/mixed_chunk_counts",
    ),
    Mutant(
        "int32_chunk_begin",
        "core/chunks.h",
        "const int64_t begin = (chunk - first_chunk) * chunk_numel",
        "const int begin = static_cast<int>((chunk - first_chunk) * chunk_numel)",
        "grad_stats/beyond_int32",
    ),
    Mutant(
        "exponents_ignored_in_merges",
        "cuda/device.cuh",
        "std::is_same_v<Number, double> ? merge(a, b) : merge_alike(a, b)",
        "merge_alike(a, b)",
        "grad_stats/extremes/f64",
    ),
    Mutant(
        "first_part_of_a_grown_chunk_only",
        "cuda/table.cuh",
        "block, chunk_numel<T>(numel))",
        "block, kChunkNumel<T>)",
        "grad_stats/beyond_int32",
    ),
    Mutant("grown_chunks_share_a_launch", "cuda/table.cuh", " && !is_grown", "", "grad_stats/beyond_int32"),
    Mutant(
        "scale_skips_a_load",
        "cuda/scale.cu",
        "for (int l = 0; l < kLoads; ++l) store_vector(",
        "for (int l = 1; l < kLoads; ++l) store_vector(",
        "scale/boundaries/f16",
    ),
    Mutant(
        "scale_repeats_the_head",
        "cuda/scale.cu",
        "T* vectors = begin + split.head",
        "T* vectors = begin + (split.head & ~1)",
        "scale/boundaries/f32",
    ),
    Mutant(
        "scale_writes_past_the_end",
        "cuda/scale.cu",
        "if (thread < split.tail)",
        "if (thread <= split.tail)",
        "scale/boundaries/bf16",
    ),
    Mutant(
        "scale_rounds_coefficient",
        "cuda/scale.cu",
        "? *static_cast<const double*>(coefficient)",
        "? static_cast<float>(*static_cast<const double*>(coefficient))",
        "scale/boundaries/f64",
    ),
    Mutant(
        "clip_reads_one_row_per_thread",
        "cuda/clip_coefficient.cu",
        "k < n_rows; k += kThreads)",
        "k < n_rows && k < kThreads; k += kThreads)",
        "clip_coefficient",
    ),
    Mutant(
        "clip_forgets_the_exponent",
        "core/stats.h",
        "exponent > 0 ? 0x1p+600 : exponent < 0",
        "exponent < 0",
        "clip_coefficient",
    ),
    Mutant(
        "clip_turns_nan_into_one",
        "core/stats.h",
        "factor > 1.0 ? 1.0 : factor",
        "factor < 1.0 ? factor : 1.0",
        "clip_coefficient",
    ),
    Mutant(
        "relu_loses_nan",
        "cuda/residual_add.cu",
        "sum <= 0 ? Wide<T>{0} : sum",
        "sum > 0 ? sum : Wide<T>{0}",
        "residual_add/forward/f32",
    ),
    Mutant(
        "mask_of_wrong_operand",
        "cuda/residual_add.cu",
        "widened(y) <= 0 ?",
        "widened(grad_y) <= 0 ?",
        "residual_add/backward/f32",
    ),
    Mutant(
        "missing_barrier_between_merges",
        "cuda/residual_add.cu",
        "    __syncthreads();",
        "    ",
        "residual_add/backward/f64",
    ),
    Mutant(
        "alignment_of_output_ignored",
        "cuda/residual_add.cu",
        "reinterpret_cast<uintptr_t>(a) ^ reinterpret_cast<uintptr_t>(b)",
        "reinterpret_cast<uintptr_t>(a) ^ reinterpret_cast<uintptr_t>(a)",
        "residual_add/forward/f32",
    ),
    Mutant(
        "element_read_after_it_is_written",
        "cuda/residual_add.cu",
        "  const T result = Operation::template apply<T>(*a, *b);",
        "  *out = Operation::template apply<T>(*a, *b);\n  const T result = Operation::template apply<T>(*a, *b);",
        "residual_add/forward/f64",
    ),
    Mutant(
        "vectors_written_with_statistics_only",
        "cuda/residual_add.cu",
        "    store_vector(out + l * stride, of_a[l]);",
        "    if (counted != Counted::kNone) store_vector(out + l * stride, of_a[l]);",
        "residual_add/backward/f32",
    ),
    Mutant(
        "merges_sums_that_were_not_taken",
        "cuda/residual_add.cu",
        "counted == Counted::kNone || n_chunks == 1",
        "n_chunks == 1",
        "residual_add/forward/f16",
    ),
    Mutant("swapped_gradients", "cuda/residual_add.cu", "rows += kStats;", "rows -= 0;", "residual_add/backward/bf16"),
    Mutant(
        "statistics_before_rounding",
        "cuda/residual_add.cu",
        "sums.outgoing.add(of_a)",
        "sums.outgoing.add(of_b)",
        "residual_add/forward/f16",
    ),
    Mutant(
        "flag_stops_the_sum_from_being_written",
        "cuda/residual_add.cu",
        "      return apply_chunk<T, Operation, Counted::kNone>(a, b, out, n, none);",
        "      return;",
        "residual_add/only_if/forward/f32",
    ),
    Mutant(
        "flag_ignored_by_the_second_launch",
        "cuda/finish.cuh",
        "  if (!is_on(enabled)) return;\n",
        "",
        "grad_stats/only_if/bf16",
    ),
    Mutant(
        "products_in_float",
        "cuda/branch_stats.cu",
        "sum += static_cast<double>(a) * static_cast<double>(b)",
        "sum += a * b",
        "branch_stats/parts/f32",
    ),
    Mutant(
        "products_of_an_idle_thread_have_a_range",
        "cuda/branch_stats.cu",
        "geometric_mean == 0.0 ? 0.0 : 1.0",
        "1.0",
        "branch_stats/ranges",
    ),
    Mutant(
        "no_barrier_between_the_two_parts",
        "cuda/branch_stats.cu",
        "  __syncthreads();  // merge_block",
        "  // merge_block",
        "branch_stats/parts/f64",
    ),
    Mutant(
        "alignment_of_the_shortcut_ignored",
        "cuda/branch_stats.cu",
        "apart % kVectorBytes == 0 ? ",
        "true ? ",
        "branch_stats/parts/bf16",
    ),
    Mutant(
        "tail_of_the_shortcut_is_the_head",
        "cuda/branch_stats.cu",
        "parts.add(branch[at], shortcut[at])",
        "parts.add(branch[at], shortcut[thread])",
        "branch_stats/parts/f16",
    ),
    Mutant(
        "counts_of_one_warp_left_out",
        "cuda/magnitudes.cu",
        "warp < kWarps; ++warp",
        "warp < kWarps - 1; ++warp",
        "magnitudes/boundaries/f32",
    ),
    Mutant(
        "counters_not_cleared_before_others_count",
        "cuda/magnitudes.cu",
        "counts[i] = 0;\n  __syncthreads();",
        "counts[i] = 0;",
        "magnitudes/boundaries/f32",
    ),
    Mutant(
        "power_of_two_in_its_own_bin",
        "core/magnitudes.h",
        "(bits - 1) >> 52",
        "bits >> 52",
        "magnitudes/extremes/bf16",
    ),
    Mutant(
        "moments_merged_at_different_scales",
        "core/magnitudes.h",
        "  rescale(b, exponent);\n",
        "",
        "magnitudes/many",
    ),
    Mutant(
        "fourth_powers_overflow",
        "cuda/magnitudes.cu",
        "if (!kOnce) {",
        "if (false) {",
        "magnitudes/extremes/f64",
    ),
    Mutant(
        "rows_of_later_launches_in_the_first",
        "cuda/magnitudes.cu",
        "rows + kMagnitudeColumns * packer.first_row()",
        "rows",
        "magnitudes/many",
    ),
)


def plant(mutant: Mutant, folder: Path) -> Path:
    """Copies csrc to `folder` with the bug; returns the copy.

    Raises:
        ValueError: The text to change does not occur exactly once.
    """
    csrc = folder / "csrc"
    shutil.copytree(CSRC, csrc)
    path = csrc / mutant.file
    source = path.read_text(encoding="utf-8")
    if source.count(mutant.old) != 1:
        raise ValueError(
            f"{mutant.name}: needed once in {mutant.file}, got {source.count(mutant.old)} times: {mutant.old!r}"
        )
    path.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
    return csrc
