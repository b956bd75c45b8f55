"""Which norm a module is, measured: its outputs and gradients on random inputs against the formulas of norms."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..ops.shared.widened import NARROW
from .norms import Norm
from .probe import Differs, attributes_of, found_or_why, keeps, run, stand_in

# The eps of norms that keep it in their code; the last one is torch's default for RMSNorm in fp32.
COMMON_EPS = (1e-6, 1e-5, 1e-8, 1e-12, torch.finfo(torch.float32).eps)
# Errors up to which fp32 is taken to have rounded: of outputs over the largest one, of the best factor between them and
# the formula's, and of gradients. Guesses, 50 to 700 times what RMS and layer norms as models write them were off by in
# rows of 8 to 1024: 1.5e-7, 4e-8 and 1.5e-7.
ROUNDING, FACTOR_ROUNDING, GRADIENT_ROUNDING = 2e-5, 2e-6, 1e-4
EPS_NAMES = ("eps", "variance_epsilon", "epsilon", "norm_eps", "layer_norm_eps", "rms_norm_eps")


def looks_like_norm(module: torch.nn.Module) -> bool:
    """One or two parameters of one dimension or none at all, no parts, and a name or an eps that says norm."""
    if any(True for _ in module.children()):
        return False
    shapes = {tuple(p.shape) for p in module.parameters(recurse=False)}
    if len(shapes) > 1 or any(len(s) != 1 for s in shapes) or len(module._parameters) > 2:
        return False
    named = "norm" in type(module).__name__.lower()
    return named or (bool(shapes) and any(name in EPS_NAMES for name in vars(module)))


class _Formula(NamedTuple):
    """A norm of parameters that are given by name. ``held`` is the attribute that holds eps, or eps itself."""

    weight: str | None
    bias: str | None
    held: str | float
    eps: float
    center: bool
    offset: float

    def __call__(self, x: torch.Tensor, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return functools.reduce(torch.add, self.terms(x, parameters))

    def terms(self, x: torch.Tensor, parameters: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """What the output is the sum of: the scaled input and, where there is one, the bias."""
        x = x - x.mean(-1, keepdim=True) if self.center else x
        y = x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        y = y if self.weight is None else y * (parameters[self.weight] + self.offset)
        return [y] if self.bias is None else [y, parameters[self.bias]]


def _rms(x):
    return x.square().mean(-1, keepdim=True).sqrt()


# What near misses turn out to be, for the report.
NEAR_MISSES: dict[str, Callable] = {
    "it adds eps outside the square root": lambda x, eps: x / (_rms(x) + eps),
    "it bounds the root mean square by eps from below": lambda x, eps: x / _rms(x).clamp_min(eps),
    "it divides by the sample's standard deviation (n - 1)": lambda x, eps: (
        (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + eps)
    ),
    "it takes the sum of squares, not their mean": lambda x, eps: x / x.norm(dim=-1, keepdim=True).clamp_min(eps),
}


class _Probe:
    """``module``'s forward on parameters of ours; hooks do not run and the module itself is not touched."""

    def __init__(self, module: torch.nn.Module, size: int):
        self.module = module
        devices = {p.device for p in module.parameters(recurse=False)} - {torch.device("meta")}
        self.device = next(iter(devices), torch.device("cpu"))
        self.generator = torch.Generator().manual_seed(size)
        self.size = size
        self.names = [name for name, p in module._parameters.items() if p is not None]

    def normal(self, *shape) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.device)

    def parameters(self) -> dict[str, torch.Tensor]:
        return {name: 0.5 + 0.5 * self.normal(self.size) for name in self.names}

    def run(self, x, parameters, training: bool = False):
        module = stand_in(
            self.module, training, _parameters={name: None for name in self.module._parameters} | parameters
        )  # fmt: skip
        before = x.detach().clone()
        y = run(module, x)
        if not isinstance(y, torch.Tensor) or y.shape != x.shape:
            raise Differs("its forward does not return one tensor of its input's shape")
        now = x.detach()
        if not ((now == before) | (now.isnan() & before.isnan())).all():
            raise Differs("its forward changes its input")
        return y


def _error(y: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest difference, relative to the largest value; infinite where there is NaN."""
    worst = ((y.double() - truth).abs().amax() / truth.abs().amax()).item()
    return worst if worst == worst else float("inf")


def _bias(y: torch.Tensor, truth: torch.Tensor) -> float:
    """The systematic part of the difference: how far the best factor between the two is from 1."""
    y, truth = y.double().flatten(), truth.flatten()
    return abs(((y @ truth) / (truth @ truth)).item() - 1.0)


def _distance(formula: _Formula, inputs, outputs, parameters) -> tuple[float, str]:
    """How far the outputs are from ``formula``, more than 1 where it is not theirs, and on which inputs most."""
    found = []
    for (what, x), y in zip(inputs, outputs, strict=True):
        truth = formula(x.double(), parameters)
        error = _error(y, truth)
        found.append((max(error / ROUNDING, _bias(y, truth) / FACTOR_ROUNDING), f"{what} by {error:.1e}"))
    return max(found)


def _eps_candidates(module) -> list[tuple[str | float, float]]:
    found = [(name, float(v)) for name, v in vars(module).items() if type(v) is float and 0.0 < v < 0.1 and name != "p"]
    return found or [(e, e) for e in COMMON_EPS]


def recognise_norm(module: torch.nn.Module) -> Norm | str:
    """The :class:`Norm` that ``module``'s forward is, by its outputs and gradients on random inputs; or why it is none.

    Inputs of several scales (eps decides at the smallest), with and without a mean, in four shapes, in training and
    evaluation mode, in fp32 and in 16 bits. Nothing global is drawn from or changed.
    """
    try:
        arguments = list(inspect.signature(type(module).forward).parameters)
    except (TypeError, ValueError):
        return "its forward has no signature"
    if len(arguments) < 2:
        return "its forward takes no input"
    why = keeps(module)
    if why is not None:
        return why
    devices = [device for device in {p.device for p in module.parameters()} if device.type == "cuda"]
    return found_or_why(_recognise, module, arguments[1], gpus=devices)


def _recognise(module, argument: str) -> Norm | str:
    parameters = [p for p in module._parameters.values() if p is not None]
    size = parameters[0].shape[0] if parameters else 96
    if size < 2:
        return f"it normalises {size} element"
    probe = _Probe(module, size)
    values = {name: p.float() for name, p in probe.parameters().items()}
    formula = _formula_of(module, probe, values)
    x = probe.normal(4, size).float()
    for mode, training, factor in (
        ("in training", True, 1.0), ("in evaluation", False, 1.0), ("with large parameters", True, 1000.0)
    ):  # fmt: skip
        _same_gradients(probe, x, {name: factor * value for name, value in values.items()}, training, mode, formula)
    dtypes = _dtype_table(probe, values, formula)
    own = parameters[0].dtype if parameters else None
    if own is not None and not any(given == own == of_weight for given, of_weight, _ in dtypes):
        name = str(own).removeprefix("torch.")
        return f"in {name} its arithmetic is another (another eps; squares or sums in 16 bits, or fp64; NaN replaced)"
    return Norm(
        weight=formula.weight,
        bias=formula.bias,
        center=formula.center,
        eps=formula.held,
        offset=formula.offset,
        argument=argument,
        dtypes=dtypes,
        attributes=attributes_of(module, formula.held),
        narrow_inside=_narrow_inside(probe, values),
        vectors=_takes_vectors(probe, values, formula),
    )


def _formula_of(module, probe: _Probe, values) -> _Formula:
    """The formula nearest to ``module``'s outputs with the parameters ``values``.

    Raises:
        Differs: that one is not its own either.
    """
    names = probe.names
    weight = next((n for n in names if n in ("weight", "scale", "gamma", "g", "w")), names[0] if names else None)
    bias = next((n for n in names if n != weight), None)
    wide = {name: p.double() for name, p in values.items()}
    eps_candidates = _eps_candidates(module)
    inputs = _inputs(probe, [e for _, e in eps_candidates])
    outputs = [probe.run(x, values).detach() for _, x in inputs]
    formulas = (
        _Formula(weight, bias, held, eps, center, offset)
        for held, eps in eps_candidates
        for center in (False, True)
        for offset in ((0.0,) if weight is None else (0.0, 1.0))
    )
    distances = ((_distance(formula, inputs, outputs, wide), formula) for formula in formulas)
    (worst, where), formula = min(distances, key=lambda found: found[0][0])
    if worst > 1.0:
        near = _near_miss(inputs, outputs, formula, wide)
        raise Differs(
            f"its forward is no RMS or layer norm{f': {near}' if near else ''} "
            f"(nearest: {'layer' if formula.center else 'RMS'} norm, off on {where} of the largest value)"
        )
    return formula


def _inputs(probe: _Probe, eps: list[float]) -> list[tuple[str, torch.Tensor]]:
    shapes = [(8, probe.size), (2, 5, probe.size), (2, 1, 3, probe.size)]
    inputs = []
    # The largest scale is beyond what code that has 16 bits in mind bounds its inputs by.
    for index, (scale, mean) in enumerate([(1.0, 0.0), (1.0, 1.0), (60.0, 0.0), (1e6, 0.0)]):
        x = scale * probe.normal(*shapes[index % 3]) + mean
        inputs.append((f"inputs of scale {scale:g} and mean {mean:g}", x.float()))
    inputs.append(("transposed inputs", probe.normal(probe.size, 4).float().t()))
    for e in sorted(set(eps))[:4]:
        for share in (0.3, 1.0):
            scale = share * e**0.5
            inputs.append((f"inputs of scale {scale:.1e}", (scale * probe.normal(8, probe.size)).float()))
    return inputs


def _near_miss(inputs, outputs, formula: _Formula, parameters) -> str | None:
    """What explains all the outputs, with the parameters and the eps of ``formula``."""
    scale = 1.0 if formula.weight is None else parameters[formula.weight]
    shift = 0.0 if formula.bias is None else parameters[formula.bias]
    for what, other in NEAR_MISSES.items():
        for factor in (scale, scale + 1.0):
            pairs = zip(inputs, outputs, strict=True)
            if all(_error(y, other(x.double(), formula.eps) * factor + shift) < ROUNDING for (_, x), y in pairs):
                return what
    return None


def _same_gradients(probe: _Probe, x, values, training: bool, where: str, formula) -> None:
    leaves = [x.clone().requires_grad_(), *(v.clone().requires_grad_() for v in values.values())]
    truths = [leaf.detach().double().requires_grad_() for leaf in leaves]
    y = probe.run(leaves[0], dict(zip(values, leaves[1:], strict=True)), training)
    truth = formula(truths[0], dict(zip(values, truths[1:], strict=True)))
    if _error(y.detach(), truth.detach()) > ROUNDING:
        raise Differs(f"{where} its forward is another")
    grad = probe.normal(*x.shape)
    got = torch.autograd.grad(y, leaves, grad.float(), allow_unused=True)
    want = torch.autograd.grad(truth, truths, grad)
    for name, g, w in zip(("input", *values), got, want, strict=True):
        if g is None or _error(g, w) > GRADIENT_ROUNDING:
            raise Differs(f"its gradient for {name} is not that of the formula that its outputs follow")


def _dtype_table(probe: _Probe, values, formula: _Formula) -> tuple:
    """(input, weight, output) dtypes for which the module agrees with the formula to a few roundings."""
    table = []
    given = (torch.float32, torch.float64, *NARROW)
    for of_input in given:
        for of_weight in given if formula.weight is not None else (None,):
            parameters = {name: v.to(of_weight) for name, v in values.items()}
            try:
                agree, out = _agrees(probe, parameters, of_input, formula)
            except Exception:  # foreign code: what it refuses is not swapped
                continue
            if agree:
                table.append((of_input, of_weight, out))
    return tuple(table)


class _Narrow(TorchDispatchMode):
    """Whether an operator that autocast runs in fp32 sees a 16-bit tensor."""

    WIDENED = ("pow", "rsqrt", "reciprocal", "norm", "linalg_vector_norm", "sum", "prod", "layer_norm", "rms_norm",
               "native_layer_norm", "_fused_rms_norm", "exp", "log")  # fmt: skip

    def __init__(self):
        super().__init__()
        self.found = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.WIDENED:
            self.found |= any(isinstance(a, torch.Tensor) and a.dtype in NARROW for a in args)
        return func(*args, **(kwargs or {}))


def _narrow_inside(probe: _Probe, values) -> bool:
    narrow = {name: value.bfloat16() for name, value in values.items()}
    with _Narrow() as seen:
        try:
            probe.run(probe.normal(4, probe.size).bfloat16(), narrow)
        except Exception:  # foreign code: taken for the kind that keeps its own forward under autocast
            return True
    return seen.found


def _takes_vectors(probe: _Probe, values, formula: _Formula) -> bool:
    """Whether an input of one dimension, a single row, is normalised as the rows of all others are."""
    x = probe.normal(probe.size).float()
    truth = formula(x.double(), {name: p.double() for name, p in values.items()})
    try:
        return all(_error(probe.run(x, values, training).detach(), truth) <= ROUNDING for training in (True, False))
    except Exception:  # foreign code, or one that returns something else: such calls stay its own
        return False


def _agrees(probe: _Probe, parameters, of_input: torch.dtype, formula) -> tuple[bool, torch.dtype]:
    involved = [of_input, *(p.dtype for p in parameters.values())]
    # Scale 1000: its squares overflow in fp16. At the smallest ones eps decides, and some code has one for each dtype.
    for scale in (1.0, 1000.0, 0.3 * formula.eps**0.5, formula.eps**0.5):
        x = (scale * probe.normal(8, probe.size)).to(of_input)
        with torch.no_grad():  # gradients were measured before; some code takes another way without
            y = probe.run(x, parameters)
        terms = formula.terms(x.double(), {name: p.double() for name, p in parameters.items()})
        truth = functools.reduce(torch.add, terms)
        # A norm in fp64 that computes in fp32 is another one: ours would not round.
        eps = max(torch.finfo(d).eps for d in (*involved, y.dtype))
        # Of the terms and not of their sum: a bias may leave little of the output, and nothing of its roundings.
        # Six of each term and four of a row's mean are a guess.
        rounded = functools.reduce(torch.add, [term.abs() for term in terms])
        bound = 6 * eps * rounded + 4 * eps * truth.abs().amax() / probe.size**0.5 + 1e-30
        if not ((y.double() - truth).abs() <= bound).all():
            return False, y.dtype
    return _spoils_what_is_not_finite(probe, parameters, of_input, formula), y.dtype


def _spoils_what_is_not_finite(probe: _Probe, parameters, of_input: torch.dtype, formula) -> bool:
    """Whether NaN and infinities among the inputs become what they become in ``formula``: some code repairs them."""
    x = probe.normal(3, probe.size)
    x[0, 0], x[1, 1], x[2, 0] = float("nan"), float("inf"), float("-inf")
    x = x.to(of_input)
    truth = formula(x.double(), {name: p.double() for name, p in parameters.items()})
    y = probe.run(x, parameters)
    return torch.equal(y.isnan(), truth.isnan()) and torch.equal(y.isinf(), truth.isinf())
