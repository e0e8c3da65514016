"""What the figures of the step benchmark are divided by, and what else their reader must know."""

from __future__ import annotations

from megatron_sdar.benchmark.step_data import Corpus
from megatron_sdar.benchmark.step_options import StepOptions


def step_notes(options: StepOptions, corpus: Corpus, num_parameters: int) -> list[str]:
    """Lines to print below the figures."""
    first = options.lengths[0]
    kept = " and ".join(str(options.shape(length).kept_row_length) for length in options.lengths)
    notes = [
        f"Model: {num_parameters / 1e6:.1f} M parameters, counted in transformers; untied head; "
        f"block length {options.block_length}; {options.threads} torch threads.",
        "answer tokens/s: label tokens of the noisy copies, masked or not, over the median seconds "
        "of an optimizer step (all rows forward and backward, clipping, fused AdamW). All forms "
        "see the same documents, weights and noise; their first losses agree to 1e-4 (bf16 2e-2).",
        "peer: transformers + dense mask + SDPA; paper: our trainer on whole copies; exact: our "
        "trainer on the blocks that the loss depends on, packed by what is left, and a last layer "
        f"without unused outputs, in rows of {kept} tokens: what is left of a document needs no "
        "row of two copies. Nothing is recomputed in backward.",
        "exact, two views: each document with two noisy copies behind one clean copy; the second "
        "masks the answer tokens that the first left (noisy_views: 2, complementary_views: true; "
        "not the default). The peer takes the two as rows of their own, so its answer tokens/s "
        "stay the same and its mean loss over both is what this form's is compared with.",
        "FLOPs: products of forward plus twice that for backward, allowed pairs and masked "
        "logits only; for the peer all pairs and the noisy half's logits, since it computes them. "
        "MFU: them over seconds over the rate of a product of "
        f"{options.gemm_size} x {options.gemm_size} that is timed before and after the step, "
        "median over the steps; 'of best' and the plot's floor: over the best rate of the run.",
        "floor: seconds that exact's FLOPs take at that rate; floor_share is exact's MFU. "
        f"speedup_vs_paper_semantics and floor_share are of rows of 2 x {first}.",
        "memory: peak resident memory of a fresh process over its state before the model was "
        "built, one step over two rows, fp32; of ours the median of three processes. 'beyond "
        "state': over weights and AdamW moments.",
        "cpu ratio: CPU seconds of all ranks (gloo, one thread each) over those of one process. "
        "apart2: two processes that share nothing, each with half of the micro-batches; what they "
        "take above 1 is what two busy cores take from each other, in the other layouts too.",
    ]
    shape = options.shape(first)
    fitting = [document for document in corpus.documents if document.ids.size <= first]
    whole, exact = (len(pack(fitting).rows) for pack in (shape.pack_whole, shape.pack_kept))
    notes.append(
        "The documents of a step were chosen to fill the rows of both packings. All "
        f"{len(fitting)} documents that were read give {whole} published rows of 2 x {first} and "
        f"{exact} with exact savings: {whole / exact:.2f} to 1."
    )
    if corpus.num_folded:
        notes.append(
            f"{corpus.num_folded} token ids of the input were folded into the model's vocabulary "
            f"(id modulo {options.arch.vocab_size - 1}): lengths and labels are real, ids are not."
        )
    return notes
