"""Keys of the noise, of what is computed of it, and of the loss.

Papers: SDAR arXiv 2510.06303, BD3-LM 2503.09573, MDLM 2406.07524, LLaDA 2502.09992, MaskGIT
2202.04200, VDM (Variational Diffusion Models) 2107.00630.
"""

from dataclasses import dataclass

from megatron_sdar.config_sections.key import key


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise, what of it is computed, and the denominator of the loss."""

    preset: str | None = key(
        "fills in keys of this section and packing_algorithm where they are not given: paper: as "
        "published (SDAR, arXiv 2510.06303); recommended: the least loss on held-out documents in "
        "our measurements at toy scale (LOG.md). The run prints what it chose",
        None,
        choices=("paper", "recommended"),
    )

    semantics: str = key(
        "exact: what cannot change the gradient is left out (noisy blocks without a masked token, "
        "clean blocks after a document's last kept one, last-layer work beyond masked tokens) and "
        "rows are packed by what is left; paper: every document in two whole copies",
        "exact",
        choices=("exact", "paper"),
    )
    row_length: int | None = key(
        "tokens of a row, copies and padding included; fewer take less memory. Default: "
        "(1 + noisy_views) * cutoff_len, what the longest document may need",
        None,
        minimum=1,
    )
    noisy_views: int = key(
        "noisy copies of a document that share its clean copy; each counts as a sample",
        1,
        minimum=1,
    )
    complementary_views: bool = key(
        "every second noisy view masks exactly what the view before it left", False
    )
    noise_level_per: str = key(
        "document: one t for each document and view, as SDAR's published code draws it; block: one "
        "for each block (BD3-LM, arXiv 2503.09573), of which every document has many",
        "document",
        choices=("document", "block"),
    )
    noise_sampling: str = key(
        "how t in [0, 1) is drawn. uniform: each alone; stratified: spread evenly over consecutive "
        "documents of an epoch and over the blocks of each, with a random shift per epoch (VDM's "
        "low-discrepancy sampler, arXiv 2107.00630): no bias. It lowers the gradient's variance "
        "with flat weights; with 1/p its effect is too small to measure at toy scale (LOG.md). "
        "With semantics exact, rows are packed again by what is left, so a step holds documents "
        "from all over a group, and the strata of blocks are what remains",
        "uniform",
        choices=("uniform", "stratified"),
    )
    noise_eps: float = key(
        "least masking probability: p = (1 - eps) t + eps", 1e-3, above=0, below=1
    )
    noise_low: float | None = key(
        "least masking probability in place of noise_eps, such as 0.1: p = low + (high - low) t. A "
        "clipped range (BD3-LM's clipped schedules, arXiv 2503.09573) has less variance; the loss "
        "is then the mean over p from low to high of what 1/p estimates, no bound of the "
        "likelihood any more. Default: noise_eps",
        None,
        above=0,
        below=1,
    )
    noise_high: float = key(
        "largest masking probability, see noise_low; below 1 the model never learns to fill a "
        "block of masks only, with which generation begins, unless chance makes one",
        1.0,
        above=0,
        maximum=1,
    )
    loss_weight: str = key(
        "what a masked token weighs. inverse_p: 1/p, without bias for the likelihood bound (MDLM, "
        "arXiv 2406.07524; LLaDA, 2502.09992); flat: 1 / (mean of p's range), as MaskGIT "
        "(2202.04200) up to a constant: less variance, but noise level p counts in proportion to "
        "p, so the loss is no bound and hard levels are favoured",
        "inverse_p",
        choices=("inverse_p", "flat"),
    )
    block_padding_labels: str = key(
        "pads that fill a document's last block. learn: trained as end of text, as published; "
        "first: only the first of them; ignore: none. What is not trained is never masked (so the "
        "noisy block shows where the document ends) and does not count in the denominator",
        "learn",
        choices=("learn", "ignore", "first"),
    )
    block_length_schedule: str | None = key(
        "block lengths that grow at steps, each a multiple of the one before, in place of "
        "block_length: 4; 8 @1000; 16 @3000 (SDAR, arXiv 2510.06303, pretrains with 4 and goes to "
        "larger blocks in fine-tuning). Rows are packed for the last one, which is also what is "
        "exported; without max_steps, counting the steps takes one pass over all noise",
        None,
    )
    loss_normalization: str = key(
        "one global token mean per step, or the published mean of means",
        "global",
        choices=("global", "llamafactory"),
    )
