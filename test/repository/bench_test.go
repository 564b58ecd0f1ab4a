// Copyright (c) The azure-vnet authors. MIT licence.

package repository

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"azurevnet/test"
)

// TestBenchmarksRun: each does, once; what they say is for people. make soak also runs the comparison with the reference
// plugins.
func TestBenchmarksRun(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make namespaces: sudo make test")
	}
	all := []string{"test -run ^$ -bench . -benchtime 1x ./pool ./bridge ./internal/statefile"}
	if test.Soaking {
		all = append(all, "run ./bench -rounds 1 -standing 3")
	}
	for _, words := range all {
		cmd := exec.CommandContext(t.Context(), "go", strings.Fields(words)...)
		cmd.Dir = test.Top
		out, err := cmd.CombinedOutput()
		if err != nil || strings.Contains(string(out), "FAIL") {
			t.Errorf("go %s: %v\n%s", words, err, out)
		}
	}
}
