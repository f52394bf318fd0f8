"""How a function gets its rewritten form while our backend compiles it, and at no other time.

Nothing of the user's is touched: no class, function or module. Dynamo asks in two places for the code that it will
trace, for the frame that it compiles (`trace_frame`) and for a function that it inlines (`get_code`). Both are
wrapped here, and answer as before unless the frame is compiled by our backend *and* the function is one of those
that Dynamo could not trace.

Which these are is found by trying. A frame is first traced such that any graph break is an error. The error's
traceback names the functions in which it happened, the innermost that can be rewritten is, and the frame is traced
again. If there is none, the frame is traced as Dynamo would have done. A frame without breaks is traced once.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import CodeType
from typing import Any

import torch
import torch._dynamo

from . import breaks, counters, recompiles
from .python_rewrite import NotRewritable, Rewritten, rewrite
from .runtime.counted import depends_on_count, symbols_of
from .runtime.memory import refuse_shared
from .runtime.refusal import for_counts, frame, originals, tracers
from .scope import options_for

logger = logging.getLogger("sm12x_compile")

# Functions that are traced in another form, and all forms that were ever made.
_rewritten: dict[CodeType, Rewritten] = {}
_forms: dict[CodeType, Rewritten | None] = {}


class _Tracing(threading.local):
    """Whether this thread traces a frame for our backend."""

    active = False


_tracing = _Tracing()
_undo: list[Callable[[], None]] = []


def form_of(code: CodeType) -> CodeType:
    """The code to trace for a function: its own, or what was found to stand for it."""
    found = _rewritten.get(code)
    if found is None or code in frame.refused or code in frame.silent:
        return code
    breaks.say_rewritten(code, found, by_count=code in for_counts)
    return found.code


def install() -> None:
    """Wrap Dynamo's two places; where a torch version lacks one of them, nothing is ever rewritten."""
    if _undo:
        return
    recompiles.install()
    try:
        counters.install(_undo)
    except (ImportError, AttributeError) as reason:
        logger.info("Python counters are constants at first with this torch: %s", reason)
    try:
        from torch._dynamo import convert_frame
        from torch._dynamo.output_graph import OutputGraph
        from torch._dynamo.variables.functions import NestedUserFunctionVariable, UserFunctionVariable
        from torch._dynamo.variables.tensor import SymNodeVariable

        signature = inspect.signature(convert_frame.trace_frame)
        missing = {"code", "instructions", "code_options", "compiler_fn", "one_graph", "speculation_log",
                   "globals"} - set(signature.parameters)  # fmt: skip
        if missing or not hasattr(torch._dynamo, "error_on_graph_break"):
            raise AttributeError(f"trace_frame without {missing}")
        OutputGraph.call_user_compiler  # noqa: B018  (missing ones shall be noticed here)
    except (ImportError, AttributeError) as reason:
        logger.info("data-dependent Python is not rewritten with this torch: %s", reason)
        return

    trace_frame = convert_frame.trace_frame

    @wraps(trace_frame)
    def tracing(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        return _trace(trace_frame, call)

    convert_frame.trace_frame = tracing
    _undo.append(lambda: setattr(convert_frame, "trace_frame", trace_frame))
    _check_whole_graphs(OutputGraph)
    for owner in (UserFunctionVariable, NestedUserFunctionVariable):
        _wrap_get_code(owner)
    _look_for_counts(SymNodeVariable)


def _check_whole_graphs(owner: Any) -> None:
    """Look at a graph once more when it is whole, before our backend gets it."""
    call_user_compiler = owner.call_user_compiler

    @wraps(call_user_compiler)
    def checked(self: Any, gm: Any, *args: Any, **kwargs: Any) -> Any:
        if _tracing.active:
            known = len(frame.refused)
            try:
                refuse_shared(self, gm.graph)
            finally:
                _report_refusals(known)
        return call_user_compiler(self, gm, *args, **kwargs)

    owner.call_user_compiler = checked
    _undo.append(lambda: setattr(owner, "call_user_compiler", call_user_compiler))


def _look_for_counts(owner: Any) -> None:
    """Rewrite a function when Dynamo is about to decide a branch on a count in it."""
    evaluate_expr = owner.evaluate_expr

    @wraps(evaluate_expr)
    def evaluating(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _tracing.active:
            _leave_to_the_data(symbols_of(self.sym_num))
        return evaluate_expr(self, *args, **kwargs)

    owner.evaluate_expr = evaluating
    _undo.append(lambda: setattr(owner, "evaluate_expr", evaluate_expr))


def _leave_to_the_data(expression: Any) -> None:
    tracer = next(tracers(), None)
    if tracer is None or expression is None or not depends_on_count(expression, tracer.output):
        return
    code = tracer.f_code
    if code in originals or code in _rewritten or code in frame.refused or code in frame.plain:
        return
    try:
        found = _forms[code] if code in _forms else rewrite(code, tracer.f_globals)
    except NotRewritable:
        found = None
    except Exception:  # ours must not fail the user's model
        logger.warning("rewriting %s failed", code.co_name, exc_info=True)
        found = None
    _forms[code] = found
    if found is not None and found.touches(tracer.lineno or 0):
        _rewritten[code] = found
        originals[found.code] = code
        for_counts.add(code)
        raise torch._dynamo.exc.UnspecializeRestartAnalysis(restart_reason="sm12x: a branch on a count")


def _wrap_get_code(owner: Any) -> None:
    get_code = owner.get_code

    @wraps(get_code)
    def replaced(self: Any) -> CodeType:
        code: CodeType = get_code(self)
        return form_of(code) if _tracing.active else code

    owner.get_code = replaced
    _undo.append(lambda: setattr(owner, "get_code", get_code))


def is_installed() -> bool:
    """Whether Dynamo's two places are wrapped."""
    return bool(_undo)


def uninstall() -> None:
    """Give Dynamo's functions back and forget what was rewritten."""
    recompiles.uninstall()
    while _undo:
        _undo.pop()()
    _rewritten.clear()
    _forms.clear()
    originals.clear()
    for_counts.clear()


@contextmanager
def _ours(log: Any) -> Iterator[None]:
    """Trace for our backend; Dynamo keeps one `log` for all its attempts at a frame."""
    before = _tracing.active, dict(vars(frame))
    if not hasattr(log, "_sm12x"):
        log._sm12x = {}
    _tracing.active = True
    frame.begin(log._sm12x)
    try:
        yield
    finally:
        _tracing.active, held = before
        vars(frame).update(held)


def _trace(trace_frame: Callable[..., Any], call: inspect.BoundArguments) -> Any:
    given = call.arguments
    options = None if given.get("export") else options_for(given["compiler_fn"])
    if options is None or not options.capture:
        return trace_frame(*call.args, **call.kwargs)
    code, log, one_graph = given["code"], given["speculation_log"], given["one_graph"]
    symbols = torch._dynamo.config.allow_unspec_int_on_nn_module or counters.counts_in_a_module(code)
    with _ours(log), torch._dynamo.config.patch(allow_unspec_int_on_nn_module=symbols):
        while not getattr(log, "_sm12x_as_it_is", False):
            _load(call, form_of(code))
            given["one_graph"] = False  # this would let sizes that depend on data into the graph
            log.clear()
            known = len(frame.refused)
            try:
                with torch._dynamo.error_on_graph_break(True), _quiet():
                    traced = trace_frame(*call.args, **call.kwargs)
            except (torch._dynamo.exc.RestartAnalysis, torch._dynamo.exc.SkipFrame):
                _report_refusals(known)
                raise
            except Exception as error:
                again = _learn(error)
                _report_refusals(known)
                if not again:
                    log._sm12x_as_it_is = True
            else:
                if traced.output_graph is None or traced.output_graph.count_calls():
                    # Dynamo keeps this for errors of later calls, which must not be ours to decide.
                    traced.error_on_graph_break = _error_on_graph_break()
                    return traced
                log._sm12x_as_it_is = True  # Dynamo skips frames that compute nothing
            log.clear()
            _forget_symbols()
        _load(call, form_of(code))
        given["one_graph"] = one_graph
        return trace_frame(*call.args, **call.kwargs)


@contextmanager
def _quiet() -> Iterator[None]:
    """Dynamo speaks of a graph break where there will be none."""
    speaker = logging.getLogger("torch._dynamo.variables.tensor")
    level = speaker.level
    speaker.setLevel(logging.ERROR)
    try:
        yield
    finally:
        speaker.setLevel(level)


def _load(call: inspect.BoundArguments, code: CodeType) -> None:
    """Give Dynamo the instructions of `code` to trace."""
    from torch._dynamo.bytecode_transformation import cleaned_instructions, get_code_keys, propagate_line_nums

    instructions = cleaned_instructions(code)
    propagate_line_nums(instructions)
    call.arguments["code"] = code
    call.arguments["instructions"][:] = instructions
    call.arguments["code_options"].clear()
    call.arguments["code_options"].update({key: getattr(code, key) for key in get_code_keys()})


def _error_on_graph_break() -> bool:
    from torch._dynamo.symbolic_convert import _get_error_on_graph_break

    return bool(_get_error_on_graph_break())


def _forget_symbols() -> None:
    """What Dynamo does between two attempts at a frame."""
    state = getattr(torch._dynamo.convert_frame, "TensorifyState", None)
    if state is not None:
        state.clear()


def _learn(error: BaseException) -> bool:
    """Whether another attempt may go better: a function was rewritten, or a rewritten one was given up."""
    frames = _frames_of(error)
    for code, line, _ in frames:
        original = originals.get(code)
        if original is not None:
            frame.give_up(original, line, f"its rewritten form does not trace: {_first_line(error)}")
            return True
    if not isinstance(error, torch._dynamo.exc.Unsupported):
        return False
    for code, line, names in frames:
        if code in frame.silent and _rewritten[code].touches(line):
            frame.silent.discard(code)  # there is more to rewrite in it than its branches on a count
            for_counts.discard(code)
            return True
        if code in _rewritten or code in frame.refused or code.co_name.startswith("torch_dynamo_resume_in"):
            continue
        try:
            found = _forms[code] if code in _forms else rewrite(code, names)
        except NotRewritable as reason:
            frame.refused[code] = (line, f"{reason} ({_first_line(error)})")
            continue
        except Exception as bug:  # ours must not fail the user's model
            logger.warning("rewriting %s failed", code.co_name, exc_info=True)
            frame.refused[code] = (line, f"rewriting it failed ({type(bug).__name__}: {bug}); please report it")
            continue
        _forms[code] = found
        if found is not None and found.touches(line):  # else it is not what broke the graph
            _rewritten[code] = found
            originals[found.code] = code
            return True
    if frames and not any(code in frame.refused for code, _, _ in frames):
        code, line, _ = frames[0]
        frame.refused[code] = (line, _first_line(error))
    return False


def _frames_of(error: BaseException | None) -> list[tuple[CodeType, int, dict[str, Any]]]:
    """The functions that were being traced when an error was raised, innermost first, with line and globals."""
    from torch._dynamo.symbolic_convert import InstructionTranslatorBase

    found: dict[int, tuple[CodeType, int, dict[str, Any]]] = {}
    while error is not None:
        trace = error.__traceback__
        while trace is not None:
            frame = trace.tb_frame
            if frame.f_code.co_varnames[:1] == ("self",):
                tracer = frame.f_locals.get("self")
                if isinstance(tracer, InstructionTranslatorBase):
                    line = getattr(tracer, "lineno", None) or tracer.f_code.co_firstlineno
                    found[id(tracer)] = (tracer.f_code, line, tracer.f_globals)
            trace = trace.tb_next
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return list(found.values())[::-1]


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0] if lines else type(error).__name__
    for line in lines[1:4]:
        if line.startswith("Explanation:"):
            said = line.removeprefix("Explanation:").strip()
    return said[:300]


def _report_refusals(known: int) -> None:
    """Report what has been refused since there were `known` refusals, and no longer what was rewritten in vain."""
    for code, (line, reason) in list(frame.refused.items())[known:]:
        breaks.say_refused(code, line, reason)
    for code in frame.silent:
        breaks.take_back(code, _rewritten[code])
