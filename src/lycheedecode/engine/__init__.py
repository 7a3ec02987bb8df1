"""The engine: prefill, decode steps, and the generation loop. Start at `engine.Engine`.

    prompts -> prefill -> Context -> decode step -> sampling -> ... -> Generation

    prompt, arguments, plans      what users give, and what is refused
    prefill, prefix, passes       several tokens at once: a prompt, what it shares with the last one, a dense pass
    context, cache, offload       what is kept between steps; the cache in host memory
    memory                        what fits
    step, decoder, weights        one token a sequence; how it runs (compiled, CUDA graph, eager); 8-bit weights
    single_steps, verify, pace    the loop token by token, or in lossless rounds
    sampling, generation          logits to tokens to text, and results
    proof                         the engine checks itself on a model

A decode step enters our attention through `models.routing`, which transformers calls in every attention layer: it calls
the `DecodeAttention` (`lycheedecode.attention`) of the step that is open.
"""

from .engine import Context, Engine
from .generation import Generation, Piece
from .sampling import Sampling

__all__ = ["Context", "Engine", "Generation", "Piece", "Sampling"]
