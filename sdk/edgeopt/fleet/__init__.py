# SPDX-License-Identifier: Apache-2.0
"""The control plane: devices, rollouts, the ledger of what devices measured, and the page that shows them."""
