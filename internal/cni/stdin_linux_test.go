// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"os"
	"strings"
	"testing"
	"time"
)

// On a busy node a call may get no CPU time until the time for its configuration is over. The runtime has written it long
// before, and the call reads it.
func TestAConfigurationIsReadHoweverLate(t *testing.T) {
	in, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	old := os.Stdin
	os.Stdin = in
	t.Cleanup(func() { os.Stdin = old; in.Close() })
	const late = -time.Second
	if _, err := out.WriteString(`{"name":`); err != nil {
		t.Fatal(err)
	}
	if conf, err := readStdin(late); err == nil || !strings.Contains(err.Error(), "does not end") {
		t.Errorf("a configuration without its end: %q, %v", conf, err)
	}
	if _, err := out.WriteString(`"azure"}`); err != nil {
		t.Fatal(err)
	}
	out.Close()
	if conf, err := readStdin(late); err != nil || string(conf) != `"azure"}` {
		t.Errorf("what is left of a whole configuration: %q, %v", conf, err)
	}
}
