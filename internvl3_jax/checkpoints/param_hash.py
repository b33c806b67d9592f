"""Sharding-invariant hash of a parameter tree, computed on the devices."""

import hashlib

import jax
import jax.numpy as jnp

from internvl3_jax.parallel.collectives import constrain


def tree_hash(leaves: dict[str, jax.Array]) -> str:
    """Returns a hash of the leaves' bits, names and shapes: 16 hexadecimal digits.

    A change of one element always changes it: each position adds another bijection of the element's
    bits to a sum modulo 2^32. Changes of several elements collide about once in 2^64 cases. One
    pass over the leaves on the devices; two words of each are copied to the host.
    """
    return combined(described(leaves))


def described(leaves: dict[str, jax.Array]) -> dict[str, str]:
    """Returns path -> description of each leaf, which `combined` hashes."""
    sums = jax.device_get(_checksums(leaves))
    return {
        path: f"{path} {leaf.dtype} {leaf.shape} {sums[path].tolist()}"
        for path, leaf in leaves.items()
    }


def combined(descriptions: dict[str, str]) -> str:
    text = "\n".join(descriptions[path] for path in sorted(descriptions))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@jax.jit
def _checksums(leaves: dict) -> dict:
    return jax.tree.map(_checksum, leaves)


def _checksum(leaf):
    """Returns u32[2]: two sums of the elements' bits, mixed with their positions."""
    word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(leaf, word).astype(jnp.uint32)
    place = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, length in enumerate(leaf.shape):
        place = place * jnp.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    first = _mix(bits ^ _mix(place + 1))
    sums = jnp.stack(
        [first.sum(dtype=jnp.uint32), _mix(first ^ jnp.uint32(0x9E3779B9)).sum(dtype=jnp.uint32)]
    )
    return constrain(sums, None)  # replicated, so that every process can read it


def _mix(x):
    """Mixes all bits of a u32, one to one: the finalizer of MurmurHash3."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)
