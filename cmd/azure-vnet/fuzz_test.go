// Copyright (c) The azure-vnet authors. MIT licence.

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// asPlugin in the environment turns the test's program into the plugin, in
// namespaces of its own where nothing it does is seen.
const asPlugin = "AZURE_VNET_TEST_AS_PLUGIN=1"

func TestMain(m *testing.M) {
	key, value, _ := strings.Cut(asPlugin, "=")
	if os.Getenv(key) != value {
		os.Exit(m.Run())
	}
	for _, dir := range []string{"/run", "/var/log"} {
		err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, "")
		if err == nil {
			err = syscall.Mount("tmpfs", dir, "tmpfs", 0, "")
		}
		if err != nil {
			os.Stderr.WriteString("panic: " + err.Error())
			os.Exit(2)
		}
	}
	main()
}

// FuzzCall gives the plugin any environment and any configuration: it answers
// with the exit status and one document that belong together, and never panics.
func FuzzCall(f *testing.F) {
	if os.Geteuid() != 0 {
		f.Skip("needs root, to make namespaces: sudo make test")
	}
	good := `{"cniVersion":"1.1.0","name":"azure","type":"azure-vnet","ipam":{"type":"azure-vnet-ipam"}}`
	for _, seed := range []struct{ verb, id, netns, ifname, args, conf string }{
		{"ADD", "c1", "/proc/self/ns/net", "eth0", "", good}, // the host's own namespace
		{"ADD", "c1", "/run/netns/none", "eth0", "IgnoreUnknown=1;K8S_POD_NAME=p;IP=10.0.0.9;MAC=02:00:00:00:00:01", good},
		{"DEL", "c1", "", "eth0", "", good},
		{"DEL", "c1", "/etc/passwd", "eth0", "", `{"cniVersion":"0.3.1","name":"azure","ipam":7,"mtu":"many"}`},
		{"CHECK", "c1", "/run/netns/c1", "eth0", "", good},
		{"CHECK", "c1", "/run/netns/c1", "eth0", "", `{"cniVersion":"1.1.0","name":"azure","ipam":{"type":"azure-vnet-ipam"},"prevResult":{"ips":[{"interface":9,"address":"1.2.3.4/5"}]}}`},
		{"GC", "", "", "", "", `{"cniVersion":"1.1.0","name":"azure","ipam":{"type":"azure-vnet-ipam"},"cni.dev/valid-attachments":null}`},
		{"GC", "", "", "", "", good}, // no list at all
		{"STATUS", "", "", "", "", good},
		{"VERSION", "", "", "", "", ""},
		{"", "", "", "", "", ""},
		{"add", "../..", "x", "a/b", "=;;=", "{"},
		{"ADD", "c1", "/proc/self/ns/net", "eth0", "", strings.Repeat("[", 10000)}, // as deep as package json goes
		{"ADD", "c1", "/proc/self/ns/net", "eth0", "", strings.Replace(good, "azure-vnet-ipam", "nobody", 1)},
		{"ADD", "c1", "x", "eth0", "", `{"cniVersion":"1.1.0","name":"azure","ipam":{"type":"azure-vnet-ipam"},"runtimeConfig":{"portMappings":[{"HostPort":-1}],"ips":"x"}}`},
		{"ADD", strings.Repeat("c", 300), "x", "eth0", "", good}, // more than a link's alias holds
	} {
		f.Add(seed.verb, seed.id, seed.netns, seed.ifname, seed.args, []byte(seed.conf))
	}
	path := f.TempDir() // with no plugin in it: any program could be named
	f.Fuzz(func(t *testing.T, verb, id, netns, ifname, args string, conf []byte) {
		if strings.Contains(verb+id+netns+ifname+args, "\x00") || len(id+netns+args) > 100000 {
			t.Skip("the kernel passes no such environment")
		}
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = []string{asPlugin, "CNI_PATH=" + path, "CNI_COMMAND=" + verb, "CNI_CONTAINERID=" + id, "CNI_NETNS=" + netns, "CNI_IFNAME=" + ifname, "CNI_ARGS=" + args}
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS}
		cmd.Stdin = bytes.NewReader(conf)
		var out, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &stderr
		err := cmd.Run()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		checkAnswer(t, verb, cmd.ProcessState.ExitCode(), out.Bytes())
		if strings.Contains(stderr.String(), "panic") || strings.Contains(out.String(), "panicked") {
			t.Errorf("a panic: %s %s", out.String(), stderr.String())
		}
	})
}

func checkAnswer(t *testing.T, verb string, code int, out []byte) {
	t.Helper()
	var doc struct {
		CNIVersion string
		Code       uint
		Msg        string
	}
	count := 0
	for dec := json.NewDecoder(bytes.NewReader(out)); ; count++ {
		if err := dec.Decode(&doc); err == io.EOF {
			break
		} else if err != nil {
			t.Fatalf("exit %d with what is no document: %v in %q", code, err, out)
		}
	}
	want := 1
	if code == 0 && verb != "ADD" && verb != "VERSION" {
		want = 0 // a success that the specification has no result for
	}
	if count != want || doc.CNIVersion == "" && want == 1 || (code == 0) != (doc.Code == 0 && doc.Msg == "") || code != 0 && code != 1 {
		t.Errorf("%s: exit %d with %q", verb, code, out)
	}
}
