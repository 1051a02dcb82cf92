"""The peer of `ditx bench --compare`: diffusers' DiTTransformer2DModel in PyTorch, at the same work.

The user installs both libraries. They are imported only here, in the peer's turn.
"""

import importlib
import importlib.util
import os
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from ditx.diffusion.schedule import linear_schedule, respace
from ditx.nn.dit import LAYER_FIELDS, DiTConfig


def check(config: Any) -> None:
    """Raise ValueError without the libraries, or for a network or an objective that diffusers does not have."""
    missing = [name for name in ("torch", "diffusers") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"--compare needs {' and '.join(missing)}; try uv pip install torch diffusers")
    for name in ("mlp_ratio", *LAYER_FIELDS):
        ours, theirs = getattr(config.model, name), getattr(DiTConfig(), name)
        if ours != theirs:
            raise ValueError(f"{name} is {ours}; the network of diffusers has {theirs} only")
    if hasattr(config, "sampling") and not config.model.learn_sigma:
        raise ValueError("--compare samples with the paper's objective; leave out --no-learn-sigma")


def use_one_gpu() -> None:
    """Leave this process one GPU, because the peer uses only one."""
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def time_peer(config: Any, backend: str, dtype: str, compiled: bool) -> dict[str, Any]:
    """One turn on the device that ours used: `times`, `compile_seconds`, `peak_bytes`, `parameters`, `versions`.

    Raises ValueError if PyTorch has no such device, or cannot compile for it.
    """
    torch = importlib.import_module("torch")
    cuda = torch.cuda.is_available()
    if backend not in ("cpu", "gpu") or (backend == "gpu") != cuda:
        raise ValueError(f"ditx uses {backend}, PyTorch {'gpu' if cuda else 'cpu'}; --compare needs both on one")
    torch.set_float32_matmul_precision("high")  # JAX's default
    torch.manual_seed(0)
    device = torch.device("cuda" if cuda else "cpu")
    network = make_network(config.model).to(device)
    call = torch.compile(network) if compiled else network
    make = make_sample if hasattr(config, "sampling") else make_train
    step = make(torch, config, network, call, device, dtype)

    def begin():
        step()
        if cuda:
            event = torch.cuda.Event()
            event.record()
            return event

    def wait(event):
        if cuda:
            event.synchronize()

    start = time.perf_counter()
    try:
        wait(begin())
    except torch._dynamo.exc.TorchDynamoException as error:
        raise ValueError(f"torch.compile fails here ({str(error)[:200]}); try --compare torch-eager") from error
    seconds = time.perf_counter() - start
    return {
        "times": intervals(begin, wait, config.repeats),
        "compile_seconds": seconds if compiled else None,
        "program_bytes": None,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "versions": {name: version(name) for name in ("torch", "diffusers")},
    }


def make_network(model: DiTConfig) -> Any:
    """The network of the same shape."""
    network = importlib.import_module("diffusers").DiTTransformer2DModel(
        num_attention_heads=model.num_heads,
        attention_head_dim=model.hidden_size // model.num_heads,
        in_channels=model.in_channels,
        out_channels=model.out_channels,
        num_layers=model.depth,
        sample_size=model.side,
        patch_size=model.patch_size,
        num_embeds_ada_norm=model.num_classes,
    )
    # The paper has one embedding of time and label; diffusers copies it for each block, a tenth more for the optimizer.
    for block in network.transformer_blocks:
        block.norm1.emb = network.transformer_blocks[0].norm1.emb
    return network


def make_train(torch: Any, config: Any, network: Any, call: Any, device: Any, dtype: str) -> Callable[[], None]:
    """The training step: mixed precision, fused AdamW, and one fused operation for the average of the weights."""
    model, size = config.model, config.model.side
    weights = list(network.parameters())
    average = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.0, fused=True)
    schedule = linear_schedule()
    alpha, sigma = (torch.tensor(t, device=device, dtype=torch.float32) for t in (schedule.alpha, schedule.sigma))
    x0 = torch.randn(config.batch_size, model.in_channels, size, size, device=device)
    labels = torch.randint(0, model.num_classes, (config.batch_size,), device=device)
    network.train()  # drops labels

    def part(x0, labels):
        i, noise = torch.randint(0, 1000, labels.shape, device=device), torch.randn_like(x0)
        x = alpha[i, None, None, None] * x0 + sigma[i, None, None, None] * noise
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


def make_sample(torch: Any, config: Any, network: Any, call: Any, device: Any, dtype: str) -> Callable[[], None]:
    """A batch of samples by deterministic DDIM, with guidance: as many forward passes as ours."""
    model, sampling, size = config.model, config.sampling.resolved(config.objective), config.model.side
    network.to(getattr(torch, dtype)).eval()
    schedule = respace(linear_schedule(), sampling.steps)
    tables = (schedule.alpha, schedule.sigma, schedule.time)
    alpha, sigma, times = (torch.tensor(table, device=device) for table in tables)
    labels = torch.arange(config.batch_size, device=device) % model.num_classes
    guided = sampling.guidance_scale != 1
    if guided:
        labels = torch.cat([labels, torch.full_like(labels, model.num_classes)])

    @torch.inference_mode()
    def sample():
        x = torch.randn(config.batch_size, model.in_channels, size, size, device=device)
        for i in reversed(range(sampling.steps)):
            inputs = torch.cat([x, x]) if guided else x
            time = times[i].expand(len(inputs))
            output = call(inputs.to(network.dtype), timestep=time, class_labels=labels).sample.float()
            noise = output[:, : model.in_channels]
            if guided:
                labelled, unlabelled = noise.chunk(2)
                noise = unlabelled + sampling.guidance_scale * (labelled - unlabelled)
            x0 = (x - sigma[i] * noise) / alpha[i]
            x = alpha[i - 1] * x0 + sigma[i - 1] * noise if i else x0

    return sample


def intervals(call: Callable[[], Any], wait: Callable[[Any], Any], repeats: int) -> list[float]:
    """Seconds from each result of `call` to the next, while the following call is already under way, as in a run."""
    wait(call())  # the first call also loads the program
    pending, times, last = call(), [], 0.0
    for _ in range(repeats + 1):
        following = call()
        wait(pending)
        now = time.perf_counter()
        times.append(now - last)
        pending, last = following, now
    wait(pending)
    return times[1:]
