# SPDX-License-Identifier: Apache-2.0
"""The error families of edgeopt, sorted by who can act on them.

A message says what was expected, what was found, where, and what to do.
"""


class EdgeoptError(Exception):
    """The root of every error that edgeopt raises on purpose."""


class RecipeError(EdgeoptError):
    """The user's input is wrong: an option, a recipe, a model, data, a name."""


class UnsupportedError(EdgeoptError):
    """This device, runtime or format cannot do what was asked."""


class TrustError(EdgeoptError):
    """Someone lied, or a key is old: a signature, a digest or a document is not what it claims to be."""


class ForgedError(TrustError):
    """An answer that nobody signed, or an old one repeated: whoever sent it lied, and another answer may be right."""


class TransportError(EdgeoptError):
    """The other side cannot be reached now; trying later may help."""


class NotOfferedError(TransportError):
    """The other side is there and does not give this: what was asked for is not for this device, or not known."""


class StoreError(EdgeoptError):
    """The disk refused: full, read-only, wrong permissions, or damaged."""


class RuntimeFailure(EdgeoptError):
    """A vendor's inference library crashed, hung or answered wrongly."""


class DocumentError(TrustError):
    """Bytes that claim to be one of our documents (manifest, message, package) and are not."""
