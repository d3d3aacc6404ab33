# SPDX-License-Identifier: Apache-2.0
"""Latencies of devices that are not at hand: what published ones of other networks say, always with an interval.

`work` counts what a model does, `table` holds what that costs on which board, `make` fits it to published latencies
(`published`, `architectures`, `boards`, `evidence`, `fit`), which are not part of the package.
"""
