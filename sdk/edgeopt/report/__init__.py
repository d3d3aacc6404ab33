# SPDX-License-Identifier: Apache-2.0
"""What a build tells: one document, as JSON for machines, a page for people, a table for the terminal."""
