"""Which options a loaded runner can serve without a reload; Ollama's rules."""

from msgspec import structs

from .types import NO_OPTIONS, RunnerOptions

SMALLEST_CONTEXT = 4
DEFAULT_BATCH = 512


def normal(options: RunnerOptions) -> RunnerOptions:
    """The same options with every value that Ollama treats as its default left out."""
    if options is NO_OPTIONS or options == NO_OPTIONS:
        return NO_OPTIONS
    context = options.num_ctx or None
    return structs.replace(
        options,
        num_ctx=max(context, SMALLEST_CONTEXT) if context else None,
        num_batch=None if options.num_batch in (0, DEFAULT_BATCH) else options.num_batch,
        num_gpu=None if (options.num_gpu or 0) < 0 else options.num_gpu,
        main_gpu=options.main_gpu or None,
        num_thread=options.num_thread or None,
        draft_num_predict=options.draft_num_predict or None,
        shift=None if options.shift else options.shift,
    )


def serves(
    loaded: RunnerOptions | None,
    wanted: RunnerOptions,
    *,
    context: int | None = None,
    default_context: int | None = None,
) -> bool:
    """Whether a runner loaded with `loaded` takes a request that wants `wanted`, both normal.

    `loaded` is `None` when somebody else loaded it: it is then believed to have been loaded
    without options, save for the `context` that Ollama lists. `default_context` is the agent's own.
    """
    if loaded is wanted:
        return True
    if loaded is None:
        loaded = NO_OPTIONS
        default_context = context or default_context
    has = loaded.num_ctx or default_context
    wants = wanted.num_ctx or default_context
    if loaded.num_ctx != wanted.num_ctx and has != wants:
        return False
    if wanted.num_gpu is not None and wanted.num_gpu != loaded.num_gpu:
        return False
    return structs.replace(loaded, num_ctx=None, num_gpu=None) == structs.replace(
        wanted, num_ctx=None, num_gpu=None
    )
