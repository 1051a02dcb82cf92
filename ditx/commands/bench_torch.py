"""The peer of `ditx bench --beside`: diffusers' DiTTransformer2DModel in PyTorch, at the work that ours does.

Both libraries are a user's own: they are imported here alone, when it is the peer's turn.
"""

import importlib
import importlib.util
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from multiprocessing import get_context
from typing import Any

from ditx.commands.bench_work import Network, Sample, Train
from ditx.diffusion.schedule import linear_schedule, respace
from ditx.nn.dit import DiTConfig


def apart(function: Callable[[], Any]) -> Any:
    """The result of `function` in a process of its own, which leaves neither threads nor memory to the next.

    Raises ValueError if it is killed.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=one_gpu) as pool:
        try:
            return pool.submit(function).result()
        except BrokenProcessPool as error:
            raise ValueError("a turn was killed, mostly for want of memory; try a smaller --batch-size") from error


def one_gpu() -> None:
    """Leave this process one GPU, since a peer uses no more."""
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def check(config: Train | Sample) -> None:
    """Raise ValueError where there is no such peer."""
    missing = [name for name in ("torch", "diffusers") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"--beside needs {' and '.join(missing)}, not installed here; try uv pip install torch diffusers"
        )
    model, usual = config.model, DiTConfig()
    for name in ("block", "mlp_ratio"):
        if getattr(model, name) != getattr(usual, name):
            raise ValueError(f"{name} is {getattr(model, name)}; diffusers' network has {getattr(usual, name)} alone")
    if isinstance(config, Sample) and not model.learn_sigma:
        raise ValueError("--beside draws with the paper's objective; leave out --no-learn-sigma")


def time_peer(config: Train | Sample, backend: str, dtype: str, compiled: bool) -> dict[str, Any]:
    """One turn on the device that ours was on: `times`, `compile_seconds`, `peak_bytes`, `parameters`, `versions`.

    Raises ValueError where PyTorch has no such device, or cannot compile for it.
    """
    torch = importlib.import_module("torch")
    cuda = torch.cuda.is_available()
    if backend not in ("cpu", "gpu") or (backend == "gpu") != cuda:
        raise ValueError(f"ditx is on {backend}, PyTorch on {'gpu' if cuda else 'cpu'}; --beside needs both on one")
    torch.set_float32_matmul_precision("high")  # as JAX has it by default
    torch.manual_seed(0)
    device = torch.device("cuda" if cuda else "cpu")
    network = make_network(torch, config).to(device)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    call = torch.compile(network) if compiled else network
    if isinstance(config, Train):
        step = make_train(torch, config, network, call, device, dtype)
    else:
        step = make_sample(torch, config, network, call, device, dtype)
    began = time.perf_counter()
    try:
        step()
        if cuda:
            torch.cuda.synchronize()
    except torch._dynamo.exc.TorchDynamoException as error:
        raise ValueError(f"torch.compile fails here ({str(error)[:200]}); try --beside torch-eager") from error
    first = time.perf_counter() - began
    times = intervals(torch, step, config.repeats, cuda)
    return {
        "times": times,
        "compile_seconds": first if compiled else None,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "parameters": parameters,
        "versions": {name: version(name) for name in ("torch", "diffusers")},
    }


def make_network(torch: Any, config: Network) -> Any:
    """The network of the same shape."""
    model = config.model
    network = importlib.import_module("diffusers").DiTTransformer2DModel(
        num_attention_heads=model.num_heads,
        attention_head_dim=model.hidden_size // model.num_heads,
        in_channels=model.in_channels,
        out_channels=model.out_channels,
        num_layers=model.depth,
        sample_size=model.input_size,
        patch_size=model.patch_size,
        num_embeds_ada_norm=model.num_classes,
    )
    # The embeddings of time and label, of which it keeps a copy for each block, are one in the paper: with copies, the
    # optimizer would have a tenth more to do.
    for block in network.transformer_blocks:
        block.norm1.emb = network.transformer_blocks[0].norm1.emb
    return network


def make_train(torch: Any, config: Train, network: Any, call: Any, device: Any, dtype: str) -> Callable[[], None]:
    """The training step: mixed precision, fused AdamW, and the average of the weights in one operation for all."""
    model, size = config.model, config.model.input_size
    weights = list(network.parameters())
    average = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.0, fused=True)
    schedule = linear_schedule()
    signal, spread = (
        torch.tensor(table, device=device, dtype=torch.float32) for table in (schedule.alpha, schedule.sigma)
    )
    x0 = torch.randn(config.batch_size, model.in_channels, size, size, device=device)
    labels = torch.randint(0, model.num_classes, (config.batch_size,), device=device)
    network.train()  # in which it drops labels

    def part(x0, labels):
        i, noise = torch.randint(0, 1000, labels.shape, device=device), torch.randn_like(x0)
        x = signal[i, None, None, None] * x0 + spread[i, None, None, None] * noise
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            output = call(x, timestep=i, class_labels=labels).sample.float()
        loss = (output[:, : model.in_channels] - noise).square().mean()
        if model.learn_sigma:
            loss = loss + 1e-3 * output[:, model.in_channels :].square().mean()
        (loss / config.accumulate).backward()

    def step():
        for rows in zip(x0.chunk(config.accumulate), labels.chunk(config.accumulate), strict=True):
            part(*rows)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(average, weights, 1 - 0.9999)

    return step


def make_sample(torch: Any, config: Sample, network: Any, call: Any, device: Any, dtype: str) -> Callable[[], None]:
    """A draw: as many forward passes as ours, with guidance in one batch, and steps of deterministic DDIM."""
    model, sampling, size = config.model, config.sampling, config.model.input_size
    network.to(getattr(torch, dtype)).eval()
    schedule = respace(linear_schedule(), sampling.steps)
    signal, spread, times = (
        torch.tensor(table, device=device) for table in (schedule.alpha, schedule.sigma, schedule.time)
    )
    labels = torch.arange(config.batch_size, device=device) % model.num_classes
    guided = sampling.guidance_scale != 1
    if guided:
        labels = torch.cat([labels, torch.full_like(labels, model.num_classes)])

    @torch.inference_mode()
    def draw():
        x = torch.randn(config.batch_size, model.in_channels, size, size, device=device)
        for i in reversed(range(sampling.steps)):
            inputs = torch.cat([x, x]) if guided else x
            time = times[i].expand(len(inputs))
            output = call(inputs.to(network.dtype), timestep=time, class_labels=labels).sample.float()
            noise = output[:, : model.in_channels]
            if guided:
                labelled, unlabelled = noise.chunk(2)
                noise = unlabelled + sampling.guidance_scale * (labelled - unlabelled)
            x0 = (x - spread[i] * noise) / signal[i]
            x = signal[i - 1] * x0 + spread[i - 1] * noise if i else x0

    return draw


def intervals(torch: Any, step: Callable[[], None], repeats: int, cuda: bool) -> list[float]:
    """Seconds from the end of each step to that of the next, which is under way already, as ours are timed."""

    def begin():
        step()
        event = torch.cuda.Event() if cuda else None
        if event:
            event.record()
        return event

    pending, times, last = begin(), [], 0.0
    for _ in range(repeats + 1):
        following = begin()
        if pending:
            pending.synchronize()
        now = time.perf_counter()
        times.append(now - last)
        pending, last = following, now
    if cuda:
        torch.cuda.synchronize()
    return times[1:]
