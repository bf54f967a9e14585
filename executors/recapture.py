"""Capture a loaded plan's model again, and refuse a plan that says otherwise.

What a plan says of random numbers, changed buffers, cuts, blocks and options decides whether gradients are
right, so it is derived from this model once more.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import nn

from rematplan.executors.block_stages import BlockExecutor
from rematplan.executors.engine import Engine
from rematplan.executors.graph_stages import CompiledExecutor, GraphExecutor
from rematplan.scheduler.capture.bit_equal_step import PlainSteps, step_result
from rematplan.scheduler.capture.blocks.block_capture import BlockCapture, capture_blocks, recorded_blocks
from rematplan.scheduler.capture.graph.compiled import CompiledCapture, compile_capture
from rematplan.scheduler.capture.graph.graph_capture import GraphCapture, capture_graph, op_graphs
from rematplan.scheduler.capture.graph.op_graph import OpGraph
from rematplan.scheduler.capture.graph.recompute import check_dropped
from rematplan.scheduler.capture.protocol import Capture, StageEffects
from rematplan.scheduler.core.errors import CaptureError, PlanMismatch
from rematplan.scheduler.costs.graph_chain import kept_storages
from rematplan.scheduler.costs.meters.peak import allocated
from rematplan.scheduler.costs.option_costs import makes_again
from rematplan.scheduler.plan.kinds import BLOCKS, COMPILED, KINDS
from rematplan.scheduler.plan.plan import CaptureRecord, Plan
from rematplan.scheduler.torch_layer.call import Call
from rematplan.scheduler.torch_layer.environment import environment_difference, environment_text
from rematplan.scheduler.torch_layer.fsdp import CollectiveCall, NoCollectives, is_distributed
from rematplan.scheduler.torch_layer.preserve import model_device, moving, preserved, uncached
from rematplan.scheduler.torch_layer.private import NormBase, detect_fake_mode

__all__ = ["ENGINES", "check_names", "recaptured"]


def check_names(plan: Plan, model: nn.Module) -> None:
    """Raise PlanMismatch if a module or buffer that a plan names is not in the model, or elsewhere."""
    record, where = plan.capture, f"planned {type(model).__name__}"
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    for what, names in (("capture.evaluating", record.evaluating), ("capture.stages", record.stages)):
        for name in names:
            if name not in modules or (name == "" and what == "capture.stages"):
                raise PlanMismatch(
                    f"{where}: the plan's {what} names {name!r}, which is no submodule of this model; make a new plan"
                )
    # Blocks change more than buffers: attributes, frozen parameters, generators, found again when they run.
    for stage, names in enumerate(() if KINDS[record.kind].runs_code else record.changed):
        for name in names:
            if name not in buffers:
                raise PlanMismatch(
                    f"{where}: the plan's capture.changed[{stage}] names {name!r}, which is no buffer of this model; make a new plan"
                )


def recaptured(plan: Plan, model: nn.Module, call: Call) -> Capture:
    """Return the capture of a plan, made on this model.

    Args:
        model: plain, in the modes of the plan.
        call: canonical, one that the plan is for.

    Raises:
        PlanMismatch: it differs from what the plan says.
    """
    try:
        return ENGINES[plan.capture.kind].again(plan, model, call)
    except (CaptureError, PlanMismatch) as error:
        raise PlanMismatch(
            f"planned {type(model).__name__}: {error}; make a new plan with solve()"
        ) from error


def _check_length(found: Capture, plan: Plan) -> None:
    if len(found) != len(plan.chain):
        raise CaptureError(f"{len(found)} stages are found where the plan has {len(plan.chain)}")


def _check_once(found: Capture, plan: Plan) -> None:
    for k, (effects, stage) in enumerate(zip(found.effects, plan.chain.stages, strict=True)):
        if effects.once and stage.recomputable:
            raise CaptureError(
                f"stage {k} ({stage.name}) must run once ({effects.once}), and the plan has it as recomputable"
            )


# ---- blocks ----------------------------------------------------------------------------------------------


def _blocks(plan: Plan, model: nn.Module, call: Call) -> BlockCapture:
    record = plan.capture
    # A plan of an earlier version has feeds by the block before alone.
    feeds = [tuple((a, o, *(back or (1,))) for a, o, *back in fed) for fed in record.fed]
    if record.fed and is_distributed():
        # A forward of this rank alone could wait for the others in a collective for ever.
        random = record.random or (True,) * len(plan.chain)
        changed = record.changed or ((),) * len(plan.chain)
        found = recorded_blocks(model, record.stages, feeds, random, changed)
        _check_length(found, plan)
        _check_recorded(model, found)
    else:
        blocks = [model.get_submodule(name) for name in dict.fromkeys(record.stages)]
        with preserved(model), moving(model) as moved:
            found = capture_blocks(model, call, blocks)
        if moved:  # solve knew of it: `preserved` puts it back at each trial from now on
            with preserved(model):
                found = capture_blocks(model, call, blocks)
        if tuple(block.name for block in found.blocks) != record.stages:
            raise CaptureError("its blocks run in another order than in the plan")
        for block, fed in zip(found.blocks, feeds, strict=False):
            if block.fed != fed:
                raise CaptureError(
                    f"block {block.label} is fed {block.fed} (argument, output, blocks back), and {fed} in the plan"
                )
    _check_length(found, plan)
    _check_once(found, plan)
    return found


def _check_recorded(model: nn.Module, found: BlockCapture) -> None:
    """Check what recorded blocks show without running.

    Each rank sees at each first run whether a block draws; which buffers it changes is taken from the record,
    unless a module whose statistics every training step changes shows that it is wrong.
    """
    for block in found.blocks:
        changed = found.effects[block.stage].changed
        for name in changed:
            if not name.startswith(f"{block.name}."):
                raise CaptureError(
                    f"buffer {name!r} does not belong to block {block.label}, which the plan says changes it"
                )
        for path, module in model.get_submodule(block.name).named_modules(prefix=block.name):
            if isinstance(module, NormBase) and module.training and module.track_running_stats:
                missing = [n for n, _ in module.named_buffers(prefix=path) if n not in changed]
                if missing:
                    raise CaptureError(
                        f"block {block.label} changes buffer {missing[0]!r}, and the plan says that it does not"
                    )


# ---- graphs ----------------------------------------------------------------------------------------------


def _again(plan: Plan, model: nn.Module, call: Call) -> GraphCapture:
    found = _graph(plan, model, call)
    _check_length(found, plan)
    with uncached():  # or casts of runs without grad would be those of the step
        _check_graph(plan, model, call, found)
        _check_options(plan, model, call, found)
    found.uncached = _runs_uncached(plan, model, call, found)
    return found


def _compiled(plan: Plan, model: nn.Module, call: Call) -> CompiledCapture:
    if detect_fake_mode() is not None:
        raise CaptureError("compiled stages do not run without data; rehearse with real=True")
    eager, shares = _graph(plan, model, call), plan.capture.shares
    _check_length(eager, plan)
    eager.uncached = _runs_uncached(plan, model, call, eager)
    with preserved(model):
        found = compile_capture(eager, model, call, lambda _: None, shares)
    _check_graph(plan, model, call, found)
    values = plan.chain.values
    for k, (stage, variants) in enumerate(zip(plan.chain.stages, found.variants, strict=True)):
        known = {variant.share: variant for variant in variants}
        for option, share in zip(stage.options, shares[k], strict=True):
            variant = known.get(share)
            if variant is None or variant.made > sum(values[value] for value in option.keeps):
                how = "is not its equal" if variant is None else f"saves {variant.made} bytes"
                raise CaptureError(
                    f"stage {k} ({found.stages[k].name}): compiled to save {share:.0%} it {how}, other than in the plan"
                )
        found.chosen.append(tuple(known[share] for share in shares[k]))
    return found


def _alike(record: CaptureRecord, model: nn.Module, call: Call) -> bool:
    with preserved(model):
        try:
            return any(graph.fingerprint() == record.graph for graph in op_graphs(model, call))
        except CaptureError:
            return False


def _graph(plan: Plan, model: nn.Module, call: Call) -> GraphCapture:
    record = plan.capture
    graph: OpGraph | None
    try:
        graph = next((graph for graph in op_graphs(model, call) if graph.fingerprint() == record.graph), None)
    except CaptureError as error:
        raise CaptureError(f"the plan's op graph cannot be captured again: {error}") from error
    if graph is None:
        differs = environment_difference(record.environment, environment_text(model_device(model).type))
        raise CaptureError(
            f"the op graph is not the one the plan was made for (torch {plan.torch_version} then, {torch.__version__} now"
            f"{f'; {differs}' if differs else ''})"
        )
    return capture_graph(graph, model, cuts=record.cuts)


def _check_graph(plan: Plan, model: nn.Module, call: Call, found: GraphCapture) -> None:
    """Compare what one run of the stages shows with the plan, then fill in what the plan adds to it."""
    record, stages = plan.capture, len(found)
    fake = detect_fake_mode() is not None
    with preserved(model), NoCollectives() if is_distributed() else nullcontext():
        try:
            drew = found.observe(model, call)
        except CollectiveCall:  # the other ranks do not make it now
            drew, found.effects = [], [*map(StageEffects, found.may_draw())]
    _check_once(found, plan)
    for k, stage in enumerate(found.stages):
        if drew and record.random and drew[k] and not record.random[k] and not fake:
            raise CaptureError(
                f"stage {k} ({stage.name}) draws random numbers, and the plan says that it does not"
            )
        missing = sorted({*found.effects[k].changed} - {*record.changed[k]}) if record.changed else []
        if missing and not fake:
            raise CaptureError(
                f"stage {k} ({stage.name}) changes buffer {missing[0]!r}, and the plan says that it does not"
            )
        read = {source.key for source in stage.sources if source.kind == "buffer"}
        strange = sorted({*record.changed[k]} - read) if record.changed else []
        if strange:
            raise CaptureError(
                f"stage {k} ({stage.name}) does not read buffer {strange[0]!r}, which the plan says it changes"
            )
    # What a plan says beyond what one run shows may depend on the data.
    random, changed = record.random or (False,) * stages, record.changed or ((),) * stages
    found.effects = [
        replace(own, random=own.random or r, changed=(*dict.fromkeys((*own.changed, *names)),))
        for own, r, names in zip(found.effects, random, changed, strict=True)
    ]
    found.gaps, found.rerun = list(record.gaps), list(record.rerun)
    dropped = [tuple(map(frozenset, options)) for options in record.dropped]
    found.dropped = dropped or [(frozenset(),)] * stages


def _check_options(plan: Plan, model: nn.Module, call: Call, found: GraphCapture) -> None:
    """Check that each option keeps no more than its bytes, and recomputes to the bit what it drops."""
    device = found.device
    size = {key: allocated(group.bytes, device) for key, group in found.graph.groups.items()}
    values = plan.chain.values
    for k, (stage, options) in enumerate(zip(plan.chain.stages, found.dropped, strict=True)):
        if options[0]:
            raise CaptureError(
                f"stage {k} ({stage.name}): option 0 keeps all, and the plan's drops {sorted(options[0])}"
            )
        for number, (option, dropped) in enumerate(zip(stage.options, options, strict=False)):
            try:
                check_dropped(found.graph, found.linear, k, dropped)
            except ValueError as error:
                raise CaptureError(f"stage {k} ({stage.name}): option {number}: {error}") from error
            kept = sum(size[key] for key in kept_storages(found, k, dropped))
            if values and kept > sum(values[value] for value in option.keeps):
                raise CaptureError(
                    f"stage {k} ({stage.name}): option {number} keeps {kept} bytes, more than the plan counts for it"
                )
    if detect_fake_mode() is not None or not any(any(options) for options in found.dropped):
        return
    tried: set[tuple[str, frozenset[int]]] = set()

    def visit(k: int, arguments: list[object]) -> None:
        for number, dropped in enumerate(found.dropped[k][: len(plan.chain.stages[k].options)]):
            key = found.stages[k].signature, dropped
            if dropped and key not in tried:
                tried.add(key)
                if not makes_again(found, k, arguments, dropped):
                    raise CaptureError(
                        f"stage {k} ({found.stages[k].name}): what option {number} drops is not made again to the bit"
                    )

    with preserved(model), torch.no_grad(), NoCollectives() if is_distributed() else nullcontext():
        try:
            found.sweep(model, call, visit)
        except CollectiveCall:  # the other ranks do not make it now
            return


def _runs_uncached(plan: Plan, model: nn.Module, call: Call, found: GraphCapture) -> bool:
    """Return whether stages run without autocast's cache: under autocast, if gradients are summed alike."""
    without = plan.capture.uncached
    if not torch.is_autocast_enabled(found.device.type):
        if without:
            raise CaptureError("the plan was made within autocast, and this forward runs outside of it")
        return False
    if is_distributed() or detect_fake_mode() is not None:
        return without
    step = functools.partial(step_result, model, lambda: model(*call[0], **call[1]), offload=True)
    torch.clear_autocast_cache()
    plain = PlainSteps(step(), step, found.device)
    found.uncached = True
    differs, _ = plain.judge(
        functools.partial(step_result, model, lambda: found.sweep(model, call), offload=True)
    )
    torch.clear_autocast_cache()
    if (differs is None) != without:
        raise CaptureError(
            f"stages {'cannot' if differs else 'can'} run without autocast's cache, and the plan says otherwise"
        )
    return without


ENGINES = {
    "graph": Engine(GraphExecutor, _again, _alike),
    COMPILED: Engine(CompiledExecutor, _compiled, _alike),
    BLOCKS: Engine(BlockExecutor, _blocks),
}
