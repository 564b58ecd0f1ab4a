// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"

	"azurevnet/bridge"
	"azurevnet/pool"
)

func TestErrorsHaveCodesAndSayNothingThatMisleads(t *testing.T) {
	for _, tt := range []struct {
		verb string
		err  error
		want types.Error
	}{
		{"ADD", fmt.Errorf("lease for x: %w: 3 ipconfigs", pool.ErrExhausted), types.Error{Code: 11, Msg: "lease for x: no free address: 3 ipconfigs"}},
		{"ADD", fmt.Errorf("lease: %w", pool.ErrSource), types.Error{Code: 11, Msg: "lease: no word of this VM's addresses"}},
		{"ADD", fmt.Errorf("lease: %w", pool.ErrNotOurs), types.Error{Code: 7, Msg: "lease: not ours to lend"}},
		{"ADD", fmt.Errorf("lease: %w", pool.ErrInUse), types.Error{Code: CodeInUse, Msg: "lease: address in use"}},
		{"ADD", fmt.Errorf("attach: %w", bridge.ErrAttached), types.Error{Code: CodeAttached, Msg: "attach: " + bridge.ErrAttached.Error()}},
		{"ADD", fmt.Errorf("prepare the NIC: %w: eth0 is in azure0", bridge.ErrTaken), types.Error{Code: 50, Msg: "prepare the NIC: the NIC is a port of a bridge: eth0 is in azure0"}},
		{"ADD", errors.Join(wrong(types.ErrInvalidNetworkConfig, "first"), errors.New("then")), types.Error{Code: 7, Msg: "first; then"}},
		{"ADD", &fs.PathError{Op: "open", Path: "/x", Err: fs.ErrNotExist}, types.Error{Code: 5, Msg: "open /x: file does not exist"}},
		{"ADD", fmt.Errorf("attach: %w", &bridge.InUseError{}), types.Error{Code: CodeInUse, Msg: "attach:"}},
		{"ADD", errors.New("Link not found"), types.Error{Code: 999, Msg: "Link not found"}},
		{"DEL", errors.New("Link Not Found"), types.Error{Code: 999, Msg: "Link missing"}}, // kubelet takes it for done
	} {
		c := &Call{Verb: tt.verb}
		if got := *c.toError(tt.err); got != tt.want {
			t.Errorf("%s %v: %+v, want %+v", tt.verb, tt.err, got, tt.want)
		}
		if again := *c.toError(c.toError(tt.err)); again != tt.want {
			t.Errorf("%s %v: told twice it is %+v", tt.verb, tt.err, again)
		}
	}
}

// as sets the environment and stdin of a call.
func as(t *testing.T, verb, conf string) {
	for key, value := range map[string]string{"COMMAND": verb, "CONTAINERID": "c1", "NETNS": "/n", "IFNAME": "eth0", "PATH": "/p", "ARGS": "", "NETNS_OVERRIDE": ""} {
		t.Setenv("CNI_"+key, value)
	}
	in, err := os.CreateTemp(t.TempDir(), "")
	if err == nil {
		_, err = in.WriteString(conf)
	}
	if err == nil {
		_, err = in.Seek(0, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	old := os.Stdin
	os.Stdin = in
	t.Cleanup(func() { os.Stdin = old; in.Close() })
}

func TestAPanicIsAnErrorDocument(t *testing.T) {
	as(t, "ADD", `{"cniVersion":"1.0.0","name":"n","logTarget":"stderr","logLevel":"error","ipam":{"type":"azure-vnet-ipam"}}`)
	var out bytes.Buffer
	p := Plugin{Name: "p", Add: func(context.Context, *Call) (*current.Result, error) { panic("ouch") }}
	code := p.serve(&out)
	var doc struct {
		CNIVersion, Msg string
		Code            uint
	}
	if err := json.Unmarshal(out.Bytes(), &doc); err != nil || code != 1 || doc.Code != 999 || doc.CNIVersion != "1.0.0" || !strings.Contains(doc.Msg, "ouch") {
		t.Errorf("exit %d with %s", code, out.Bytes())
	}
}

func TestAnErrorSaysItsVersion(t *testing.T) {
	const conf = `{"cniVersion":"0.3.1","name":"n","logTarget":"stderr","logLevel":"error","ipam":{"type":"azure-vnet-ipam"}}`
	for _, tt := range []struct {
		name, verb, conf, env string
		code                  uint
		want                  string
	}{
		{"a bad container id", "ADD", conf, "CNI_CONTAINERID=a/b", 4, "0.3.1"},
		{"no interface name", "DEL", conf, "CNI_IFNAME=", 4, "0.3.1"},
		{"an unknown verb", "SING", conf, "", 4, "0.3.1"},
		{"no name", "ADD", strings.Replace(conf, `"n"`, `""`, 1), "", 7, "0.3.1"},
		{"a name of the wrong kind", "ADD", strings.Replace(conf, `"n"`, `7`, 1), "", 6, "0.3.1"},
		{"CHECK is younger", "CHECK", conf, "", 1, "0.3.1"},
		{"GC is younger", "GC", conf, "", 1, "0.3.1"},
		{"STATUS is younger", "STATUS", conf, "", 1, "0.3.1"},
		{"a configuration that names none", "ADD", `{"name":"n","logLevel":"error"}`, "CNI_CONTAINERID=a/b", 4, "0.1.0"},
		{"a version to come", "ADD", `{"name":"n","cniVersion":"9.0.0"}`, "", 1, "1.1.0"},
		{"no configuration", "ADD", "", "", 6, "1.1.0"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			as(t, tt.verb, tt.conf)
			if key, value, ok := strings.Cut(tt.env, "="); ok {
				t.Setenv(key, value)
			}
			var out bytes.Buffer
			never := func(context.Context, *Call) error { return errors.New("it is called") }
			code := Plugin{Name: "p", Add: func(ctx context.Context, c *Call) (*current.Result, error) { return nil, never(ctx, c) },
				Del: never, Check: never, GC: never, Status: never}.serve(&out)
			var doc struct {
				CNIVersion string
				Code       uint
			}
			if err := json.Unmarshal(out.Bytes(), &doc); err != nil || code != 1 || doc.Code != tt.code || doc.CNIVersion != tt.want {
				t.Errorf("exit %d with %s; code %d is wanted, in version %s", code, out.Bytes(), tt.code, tt.want)
			}
		})
	}
}

func TestTheLogIsBoundedAndWhole(t *testing.T) {
	log := boundedLog{filepath.Join(t.TempDir(), "azure-vnet.log"), logFile.most}
	path, line := log.path, []byte(strings.Repeat("x", 1023)+"\n")
	most := int(log.most) + 64*len(line) // 8 writers, each a few lines late
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range int(log.most) / len(line) {
				log.add(string(line), time.Now(), false)
			}
		})
	}
	all.Wait()
	for _, name := range []string{path, path + ".1"} {
		text, err := os.ReadFile(name)
		if err != nil && name == path {
			continue // just moved aside
		}
		if err != nil || len(text) > most || len(text)%len(line) != 0 {
			t.Errorf("%s has %d bytes: %v", name, len(text), err)
		}
		for l := range bytes.Lines(text) {
			if !bytes.Equal(l, line) {
				t.Fatalf("a torn line: %q", l)
			}
		}
	}
}
