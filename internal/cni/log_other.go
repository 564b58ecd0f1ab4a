// Copyright (c) The azure-vnet authors. MIT licence.

//go:build !linux

package cni

import (
	"log/slog"
	"os"
)

// writeLine writes a line to stderr, whatever the target. The log file and its counts need Linux's file locks: see
// log_linux.go.
func writeLine(_ string, _ slog.Level, _, line string, _ bool) { _, _ = os.Stderr.WriteString(line) }
