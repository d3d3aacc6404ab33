# SPDX-License-Identifier: Apache-2.0
"""Quantizers to compare with, one module each.

A module offers `VARIANTS` (name -> what a reader sees), `IMPORTS` (what is imported before time and memory are taken)
and `make(work) -> Path`, which writes a model file below `work.target`. `requirements/<name>.txt` is its environment.
A peer is used as its documentation says; where it offers a choice, the choice is a variant.
"""
