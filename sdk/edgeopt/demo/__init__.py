# SPDX-License-Identifier: Apache-2.0
"""`make demo`: the whole way, from a published ImageNet model to latencies that agents measured, on this machine."""
