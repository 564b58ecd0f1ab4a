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
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
)

func TestErrorsHaveCodesAndSayNothingThatMisleads(t *testing.T) {
	errFull := errors.New("no address")
	plugin := Plugin{Code: func(err error) uint {
		if errors.Is(err, errFull) {
			return types.ErrTryAgainLater
		}
		return 0
	}}
	for _, tt := range []struct {
		verb string
		err  error
		want types.Error
	}{
		{"ADD", fmt.Errorf("lease: %w: 3 ipconfigs", errFull), types.Error{Code: 11, Msg: "lease: no address: 3 ipconfigs"}},
		{"ADD", errors.Join(Errorf(types.ErrInvalidNetworkConfig, "first"), errors.New("then")), types.Error{Code: 7, Msg: "first; then"}},
		{"ADD", &fs.PathError{Op: "open", Path: "/x", Err: fs.ErrNotExist}, types.Error{Code: 5, Msg: "open /x: file does not exist"}},
		{"ADD", errors.New("Link not found"), types.Error{Code: 999, Msg: "Link not found"}},
		{"DEL", errors.New("Link Not Found"), types.Error{Code: 999, Msg: "Link missing"}}, // kubelet takes it for done
	} {
		c := &Call{Verb: tt.verb, plugin: plugin}
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
