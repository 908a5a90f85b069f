"""MaxSim: the relevance of a document to a query when both are many vectors, one per token.

    score(q, d) = sum over i of max over j of q_i · d_j

The late interaction of ColBERT (Khattab & Zaharia 2020, https://arxiv.org/abs/2004.12832).
Imports no torch.
"""

from __future__ import annotations

import numpy as np

from visavis.errors import InputError


def maxsim(query: np.ndarray, document: np.ndarray) -> float:
    """Return the MaxSim score of two items of `Model.embed_multi`; more is more relevant.

    The largest score is the number of vectors of the query. Divided by it, scores of queries of
    different lengths compare: the mean of the best cosines.

    Args:
        query: unit vectors, [tokens, D].
        document: unit vectors, [tokens, D].

    Raises:
        InputError: the two are no matrices of the same width, or one is empty.
    """
    shapes = query.shape, document.shape
    if any(len(one) != 2 or not one[0] for one in shapes) or shapes[0][1] != shapes[1][1]:
        raise InputError(
            f"the query has the shape {shapes[0]} and the document {shapes[1]}, expected two "
            "matrices [tokens, D] of one width, each of at least one token: give one item of "
            "Model.embed_multi each, both of the same model."
        )
    best = (query.astype(np.float32) @ document.astype(np.float32).T).max(axis=1)  # [tokens]
    return float(best.sum())
