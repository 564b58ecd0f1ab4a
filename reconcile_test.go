// Copyright (c) The azure-vnet authors. MIT licence.

package main

import (
	"strings"
	"testing"
	"time"
)

// A stop breaks off what the plugin does in the background, and nothing of it has failed.
func TestAStopAtAnyMomentLogsNoError(t *testing.T) {
	newVM(t, 2)
	data := t.TempDir()
	first := startPlugin(t, data)
	first.createNetwork(netID, nil)
	first.end()
	for i := range 40 {
		e := startPlugin(t, data)
		time.Sleep(time.Duration(i) * 2 * time.Millisecond)
		e.end()
		for line := range strings.Lines(e.log.String()) {
			if strings.Contains(line, "level=error") || strings.Contains(line, "level=warn") {
				t.Errorf("stopped after %d ms: %s", 2*i, line)
			}
		}
	}
}
