# SPDX-License-Identifier: Apache-2.0
"""What the ExecuTorch pass is made of: where integers go in an exported graph, and writing them there."""
