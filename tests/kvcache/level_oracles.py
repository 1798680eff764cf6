"""Levels by their definitions, one pair after the other in plain Python, for `test_levels.py`."""

import math

import torch

EPSILON = 1e-8


class OutOfReachError(Exception):
    """More is asked for than is left."""


def count(ratio, n):
    return max(1, min(n, math.floor(ratio * n + 0.5)))


def best(values, k, allowed):
    """Indices of the `k` largest, ties by lower index."""
    if len(allowed) < k:
        raise OutOfReachError
    return sorted(allowed, key=lambda i: (-values[i], i))[:k]


class Case:
    """What a level is asked, as Python lists; `keep` is what an oracle marks."""

    def __init__(self, scores, ratio, left, norms):
        self.layers, self.heads, self.n = scores.shape
        self.scores, self.norms, self.ratio = scores.tolist(), norms.tolist(), ratio
        self.left = [[[i for i in range(self.n) if row[i]] for row in layer] for layer in left.tolist()]
        self.keep = torch.zeros(scores.shape, dtype=torch.bool)
        self.top = max(x for layer in self.scores for row in layer for x in row)
        rows = [row for layer in self.scores for row in layer]
        self.always = [i for i in range(self.n) if all(row[i] == self.top for row in rows)]

    def each_head(self):
        return [(layer, head) for layer in range(self.layers) for head in range(self.heads)]


def adakv(case, alpha=0.2):
    k = count(case.ratio, case.n)
    for layer in range(case.layers):
        pairs = [(head, i) for head in range(case.heads) for i in case.left[layer][head]]
        floors = {}
        for head in range(case.heads):
            kept = best(case.scores[layer][head], max(1, int(alpha * k)), case.left[layer][head])
            floors |= {(head, i): True for i in kept}
        if len(pairs) < case.heads * k:
            raise OutOfReachError
        pairs.sort(key=lambda pair: (pair not in floors, -case.scores[layer][pair[0]][pair[1]], pair))
        for head, i in pairs[: case.heads * k]:
            case.keep[layer, head, i] = True


def critical(case, budgets=None, floor=0, *, epsilon=1e-4, first=0.5, shift=True):
    for layer, head in case.each_head():
        scores, norms, left = (part[layer][head] for part in (case.scores, case.norms, case.left))
        k = count(case.ratio, case.n) if budgets is None else budgets[layer][head]
        base = min(0, *scores) if shift else 0
        weighted = [(score - base + epsilon) * norm for score, norm in zip(scores, norms, strict=True)]
        chosen = best(scores, max(int(k * first), floor), left)
        rest = [i for i in left if i not in chosen]
        if len(left) < k:
            raise OutOfReachError
        rest.sort(key=lambda i: (scores[i] != case.top, -weighted[i], i))
        case.keep[layer, head, chosen + rest[: k - len(chosen)]] = True


def critical_adakv(case, alpha=0.2):
    adakv(case, alpha)
    budgets = case.keep.sum(-1).tolist()
    case.keep.zero_()
    critical(case, budgets, max(1, int(alpha * count(case.ratio, case.n))))


def per_layer(case, weights):
    """Handed out one by one: the next token goes where weight / (tokens + 1/2) is largest."""
    counts = [1] * case.layers
    while sum(counts) < count(case.ratio, case.layers * case.n):
        open_layers = [i for i in range(case.layers) if counts[i] < case.n]
        counts[max(open_layers, key=lambda i: (weights[i] / (counts[i] + 0.5), -i))] += 1
    for layer, head in case.each_head():
        case.keep[layer, head, best(case.scores[layer][head], counts[layer], case.left[layer][head])] = True


def cut(n, size):
    return [list(range(start, min(n, start + size))) for start in range(0, n, size)]


def means(case, layer, chunks):
    summed = [sum(case.scores[layer][head][i] for head in range(case.heads)) for i in range(case.n)]
    return summed, [sum(summed[i] for i in chunk) / len(chunk) for chunk in chunks]


def chunkkv(case, size):
    if case.n < size:
        return uniform(case)
    chunks = cut(case.n, size)
    for layer in range(case.layers):
        _, scores = means(case, layer, chunks)
        whole = [j for j, chunk in enumerate(chunks) if all(set(chunk) <= set(left) for left in case.left[layer])]
        lifted = [(any(i in case.always for i in chunk), score) for chunk, score in zip(chunks, scores, strict=True)]
        k = count(case.ratio, len(chunks))
        if len(whole) < k:
            raise OutOfReachError
        for j in sorted(whole, key=lambda j: (not lifted[j][0], -lifted[j][1], j))[:k]:
            case.keep[layer, :, chunks[j]] = True


def entropy(scores):
    if len(scores) == 1:
        return 0
    lifted = [score - min(0, *scores) for score in scores]
    shares = [score / (sum(lifted) + EPSILON) for score in lifted]
    found = -sum(share * math.log(share + EPSILON) for share in shares) / math.log(len(scores))
    return round(min(1, max(0, found)), 9)


def lower_median(values):
    return sorted(values)[(len(values) - 1) // 2]


def entropy_chunkkv(case, size, few):
    chunks = cut(case.n, size)
    for layer in range(case.layers):
        scores, mean = means(case, layer, chunks)
        left = [i for i in range(case.n) if all(i in head for head in case.left[layer])]
        entropies = [entropy([scores[i] for i in chunk]) for chunk in chunks]
        k = count(case.ratio, case.n)
        if len(left) < k:
            raise OutOfReachError
        taken = []
        for j in sorted(range(len(chunks)), key=lambda j: (-mean[j], j)):
            there = [i for i in chunks[j] if i in left]
            room = min(len(there), k - len(taken))
            if mean[j] >= lower_median(mean) and entropies[j] < lower_median(entropies):
                room = min(room, few)
            taken += best(scores, room, there)
        left.sort(key=lambda i: (i not in case.always, i not in taken, -scores[i], i))
        case.keep[layer, :, left[:k]] = True


def uniform(case):
    for layer, head in case.each_head():
        kept = best(case.scores[layer][head], count(case.ratio, case.n), case.left[layer][head])
        case.keep[layer, head, kept] = True


def chunk_by_chunk(case, size):
    for layer, head in case.each_head():
        for chunk in cut(case.n, size):
            left = [i for i in chunk if i in case.left[layer][head]]
            case.keep[layer, head, best(case.scores[layer][head], count(case.ratio, len(chunk)), left)] = True


def window(case, size):
    pairs = [(layer, head, i) for layer, head in case.each_head() for i in case.left[layer][head]]

    def rank(pair):
        score = case.scores[pair[0]][pair[1]][pair[2]]
        return pair[2] < case.n - size and score != case.top, -score, pair

    k = count(case.ratio, case.layers * case.heads * case.n)
    if len(pairs) < k:
        raise OutOfReachError
    for pair in sorted(pairs, key=rank)[:k]:
        case.keep[pair] = True
