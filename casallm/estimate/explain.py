"""The arithmetic of the recommended offer, line by line, so that it can be done again by hand.

Every line shows enough digits for that: the factors printed multiply to the figure printed, to one
part in ten thousand.
"""

import math

from casallm.estimate import spot
from casallm.estimate.answer import doubts, usd_range, wrap
from casallm.estimate.architecture import count_matmul_params
from casallm.estimate.cost import N_DRAWS
from casallm.estimate.estimator import Estimate
from casallm.estimate.job import SETUP_SPREAD, SPOT_PRICE_SKEW, SPOT_PRICE_SPREAD, Job
from casallm.estimate.layout import fits_ddp, most_sequences, setup_memory
from casallm.estimate.throughput import Z90, Setup, prudence, step_time
from casallm.units import format_bytes, format_count


def format_explain(estimate: Estimate, *, width: int = 100) -> str:
    """The arithmetic of the recommended offer as plain text."""
    best = estimate.offers[0]
    bill = best.bill
    lines = [
        f"{best.name}, recommended: {estimate.reason}.",
        "",
        *_work(estimate),
        *_machine(best.job.setup),
        *_memory(best.job.setup),
        *_rate(estimate),
        *_hours(estimate),
        "Bill",
    ]
    size = max(len(item.name) for item in bill.items)
    for item in bill.items:
        lines.append(f"  {item.name:{size}}  {item.usd:10,.2f}  {item.source}")
    lines.append(f"  {'total':{size}}  {bill.usd.p50:10,.2f}  {usd_range(bill.usd)}")
    lines.append(_range(best.job))
    lines += [f"But       {doubt}" for doubt in doubts(estimate)]
    return "\n".join(wrap(line, width, indent=10) for line in lines)


def _work(estimate: Estimate) -> list[str]:
    config, context_length = estimate.config, estimate.request.context_length
    return [
        f"Work      {format_count(estimate.n_params)} parameters: {config.family},"
        f" {config.n_layers} layers of {config.d_model}, {config.n_heads} heads, MLP"
        f" {config.ff_width}, vocabulary {config.vocab_size:,}",
        f"          6 x {count_matmul_params(config):,} matrix weights + 12 x {config.n_layers}"
        f" layers x {config.d_model} x {context_length} context",
        f"          = {estimate.flops_per_token / 1e9:.4f} GFLOP a token, x"
        f" {estimate.tokens:,} tokens = {estimate.total_flops:.4g} FLOP",
    ]


def _machine(setup: Setup) -> list[str]:
    shards = {
        "ddp": "every GPU holds the whole model",
        "zero1": "every GPU holds the model, the optimizer's state is sharded",
        "model": "the model is split, the optimizer's state is sharded",
    }.get(setup.sharding, "the state is sharded")
    lines = [
        f"Machine   {setup.n_gpus} x {setup.hardware.name},"
        f" {setup.hardware.peak_flops / 1e12:.0f} TFLOP/s peak each, of which large products"
        f" sustain {setup.hardware.sustained_fraction:.0%}",
        f"Layout    micro-batch {setup.micro_batch_size} x {setup.context_length} tokens, global"
        f" batch {setup.global_batch_size}, recompute {setup.recompute}; {shards}",
    ]
    shared = [f"{setup.sequence_split} GPUs share a sequence"] * (setup.sequence_split > 1)
    shared += [f"{setup.stages} stages of a pipeline share the blocks"] * (setup.stages > 1)
    return [*lines, f"          {', '.join(shared)}"] if shared else lines


def _memory(setup: Setup) -> list[str]:
    memory = setup_memory(setup)
    parts = " + ".join(
        f"{name} {format_bytes(getattr(memory, name))}"
        for name in ("weights", "gradients", "optimizer", "activations", "logits", "margin")
    )
    return [
        f"Memory    {format_bytes(memory.total)} of {format_bytes(setup.hardware.memory_bytes)}:"
        f" {parts}",
        f"          at most {most_sequences(setup)} sequences would fit; DDP"
        f" {'fits' if fits_ddp(setup) else 'does not fit'}",
    ]


def _rate(estimate: Estimate) -> list[str]:
    best = estimate.offers[0]
    job, time = best.job, step_time(best.job.setup)
    parts = ", ".join(
        f"{name} {getattr(time, name) / time.seconds:.0%}"
        for name in ("matrix", "attention", "tail", "communication", "optimizer")
    )
    lines = [
        f"Rate      a step of {time.tokens:,.0f} tokens takes {time.seconds:.4g} s:",
        f"          {parts}",
    ]
    if estimate.request.measured_tokens_per_second is not None:
        lines.append("          the run's own rate replaces that:")
    elif estimate.request.is_own:
        lines.append(
            f"          x {prudence(job.setup.hardware):.2g}, what whole runs keep of it elsewhere"
            " (casallm's own is not measured"
            + (")" if job.setup.hardware.is_calibrated else ", and no run has calibrated this GPU)")
        )
    spread = f"{format_count(job.rate.p10)} to {format_count(job.rate.p90)}"
    lines.append(
        f"          = {job.rate.p50:,.0f} tokens/s ({spread}), {best.mfu:.1%} MFU (standard"
        " convention)"
    )
    return lines


def _hours(estimate: Estimate) -> list[str]:
    best = estimate.offers[0]
    hours, bill = estimate.tokens / best.job.rate.p50 / 3600, best.bill
    waiting = " and the waiting" if best.job.is_spot else ""
    return [
        f"Hours     {estimate.tokens:,} / {best.job.rate.p50:,.0f} tokens/s = {hours:.5g} h of"
        f" training; {bill.hours.p50:.2f} h with the machine's other hours below{waiting}",
        f"          goodput {bill.goodput:.1%}: training, evaluation and sft, as a share of the"
        " hours after the startup",
    ]


def _range(job: Job) -> str:
    """What the interval is made of: eight of ten draws of each lie within a factor either way."""
    uncertain = {"the startup": SETUP_SPREAD}
    if job.is_spot:
        uncertain |= {
            "the time between preemptions": spot.MTBF_SPREAD,
            "the waiting": spot.WAIT_SPREAD,
            "a lower spot price": SPOT_PRICE_SPREAD,
            "a higher one": SPOT_PRICE_SPREAD * SPOT_PRICE_SKEW,
        }
    factors = [f"{name} {math.exp(Z90 * sigma):.2f}" for name, sigma in uncertain.items()]
    return (
        f"Range     of {N_DRAWS:,} seeded draws, eight of ten: the rate"
        f" {format_count(job.rate.p10)} to {format_count(job.rate.p90)} tokens/s; within a factor"
        f" of the middle {', '.join(factors)}"
    )
