// Copyright (c) The azure-vnet authors. MIT licence.

package main

import (
	"context"
	"errors"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// serveAPI answers as an engine's API does: paths without their version.
func serveAPI(t *testing.T, answers map[string]string) dockerd {
	t.Helper()
	e := dockerd{socket: filepath.Join(t.TempDir(), "docker.sock"), plugin: strings.Repeat("a", 64)}
	l, err := net.Listen("unix", e.socket)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	srv := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, path, versioned := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v"), "/")
		if !versioned {
			path = strings.TrimPrefix(r.URL.Path, "/")
		}
		body, ok := answers[path]
		switch {
		case body == "hang":
			<-done
		case path == "_ping":
			w.Header().Set("Api-Version", "1.41")
		case ok:
			w.Header().Set("Content-Type", "application/json")
			w.Write([]byte(body))
		default:
			http.Error(w, `{"message":"no such thing"}`, http.StatusNotFound)
		}
	})}
	go srv.Serve(l)
	t.Cleanup(func() { close(done); srv.Close() })
	return e
}

func TestTheEnginesListOfNetworks(t *testing.T) {
	const whole = `[{"Name":"none","Id":"n"},{"Name":"host","Id":"h"},{"Name":"azure","Id":"x"}]`
	ours := "plugins/" + strings.Repeat("a", 64) + "/json"
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	t.Run("whole", func(t *testing.T) {
		got, err := serveAPI(t, map[string]string{ours: `{}`, "networks": whole}).networks(ctx)
		if err != nil {
			t.Fatal(err)
		}
		expect(t, "networks", map[string]bool{"n": true, "h": true, "x": true}, got)
	})
	for name, answers := range map[string]map[string]string{
		"of another engine, which has no such plugin": {"networks": whole},
		"in part":    {ours: `{}`, "networks": `[{"Name":"azure","Id":"x"}]`},
		"empty":      {ours: `{}`, "networks": `[]`},
		"null":       {ours: `{}`, "networks": `null`},
		"not JSON":   {ours: `{}`, "networks": `<html>`},
		"not at all": {ours: `{}`},
		"an object":  {ours: `{}`, "networks": `{"message":"starting"}`},
	} {
		t.Run(name+", says nothing", func(t *testing.T) {
			if got, err := serveAPI(t, answers).networks(ctx); err == nil {
				t.Errorf("it gives %v", got)
			}
		})
	}
	t.Run("an engine that hangs is waited for no longer than told", func(t *testing.T) {
		for _, path := range []string{"_ping", ours, "networks"} {
			answers := map[string]string{ours: `{}`, "networks": whole}
			answers[path] = "hang"
			short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
			if _, err := serveAPI(t, answers).networks(short); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%s hangs: %v", path, err)
			}
			cancel()
		}
	})
	t.Run("an engine elsewhere is not asked", func(t *testing.T) {
		if _, err := (dockerd{socket: filepath.Join(t.TempDir(), "docker.sock")}).networks(ctx); !errors.Is(err, errNoEngine) {
			t.Error(err)
		}
	})
}

func TestThePluginsIDInItsEngine(t *testing.T) {
	id := strings.Repeat("0a", 32)
	line := "60 59 254:1 /var/lib/docker/plugins/" + id + "/propagated-mount /data rw,relatime shared:3 - ext4 /dev/root rw\n"
	for _, c := range []struct{ name, mountinfo, data, want string }{
		{"a managed plugin", "1 0 0:5 / / rw - overlay overlay rw\n" + line, "/data", id},
		{"another directory", line, "/var/lib/azure-vnet", ""},
		{"a directory of its own", "60 59 254:1 /srv/data /data rw - ext4 /dev/root rw\n", "/data", ""},
		{"no mounts", "", "/data", ""},
	} {
		if got := pluginID(c.mountinfo, c.data); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
	expect(t, "where the host has its data", "$(docker info -f '{{.DockerRootDir}}')/plugins/"+id+"/propagated-mount", dockerd{plugin: id}.data())
	expect(t, "where a plugin that no engine manages has its data", "", dockerd{}.data())
}
