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

// source tells addresses that can be lent.
const source = `{"Interfaces":[{"MacAddress":"000D3A047598","IsPrimary":true,"IPSubnets":[{"Prefix":"10.240.0.0/16","IPAddresses":[
	{"Address":"10.240.0.4","IsPrimary":true},{"Address":"10.240.0.5","IsPrimary":false},{"Address":"10.240.0.9","IsPrimary":false}]}]}]}`

func TestMain(m *testing.M) {
	key, value, _ := strings.Cut(asPlugin, "=")
	if os.Getenv(key) != value {
		os.Exit(m.Run())
	}
	err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, "")
	for _, dir := range []string{"/run", "/var/log"} {
		if err == nil {
			err = syscall.Mount("tmpfs", dir, "tmpfs", 0, "")
		}
	}
	if err == nil {
		err = os.WriteFile("/run/nics.json", []byte(source), 0o600)
	}
	if err != nil {
		os.Stderr.WriteString("panic: " + err.Error())
		os.Exit(2)
	}
	main()
}

// call runs the plugin on a host of its own, of which no source but the file is
// reached.
func call(t *testing.T, verb, id, args string, conf []byte) (code int, out []byte, said string) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{asPlugin, "GORACE=atexit_sleep_ms=0", "CNI_PATH=/nowhere", "CNI_COMMAND=" + verb, "CNI_CONTAINERID=" + id, "CNI_NETNS=/run/netns/c1", "CNI_IFNAME=eth0", "CNI_ARGS=" + args}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS}
	cmd.Stdin = bytes.NewReader(conf)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), stdout.Bytes(), stderr.String()
}

const good = `{"cniVersion":"1.1.0","name":"n","type":"macvlan","master":"eth0","ipam":{"type":"azure-vnet-ipam","environment":"/run/nics.json"}}`

// FuzzCall gives the plugin any call: it answers with the exit status and one
// document that belong together, and never panics.
func FuzzCall(f *testing.F) {
	if os.Geteuid() != 0 {
		f.Skip("needs root, to make namespaces: sudo make test")
	}
	for _, seed := range []struct{ verb, args, conf string }{
		{"ADD", "", good},
		{"ADD", "IP=10.240.0.9", strings.Replace(good, "1.1.0", "0.1.0", 1)},
		{"ADD", "IP=10.240.0.4", good}, // the host's own
		{"ADD", "", strings.Replace(good, `"environment"`, `"subnet":"10.9.0.0/16","environment"`, 1)},
		{"ADD", "", strings.Replace(good, `"eth0"`, `{"no":"string"}`, 1)}, // another's key
		{"DEL", "", good},
		{"DEL", "", `{"cniVersion":"0.3.1","name":"n","ipam":7}`},
		{"CHECK", "", good},
		{"CHECK", "", strings.Replace(good, `"name"`, `"prevResult":{"cniVersion":"1.1.0","ips":[{"address":"10.240.0.5/16"}]},"name"`, 1)},
		{"GC", "", strings.Replace(good, `"name"`, `"cni.dev/valid-attachments":[{"containerID":"c1","ifname":"eth0"}],"name"`, 1)},
		{"GC", "", strings.Replace(good, `"name"`, `"cni.dev/valid-attachments":null,"name"`, 1)},
		{"GC", "", good}, // no list at all
		{"STATUS", "", good},
		{"VERSION", "", ""},
		{"", "", ""},
		{"ADD", "=;;=", "{"},
	} {
		f.Add(seed.verb, "c1", seed.args, []byte(seed.conf))
	}
	f.Fuzz(func(t *testing.T, verb, id, args string, conf []byte) {
		if strings.Contains(verb+id+args, "\x00") || len(id+args) > 100000 {
			t.Skip("the kernel passes no such environment")
		}
		code, out, said := call(t, verb, id, args, conf)
		checkAnswer(t, verb, code, out)
		if strings.Contains(said, "panic") || strings.Contains(string(out), "panicked") {
			t.Errorf("a panic: %s %s", out, said)
		}
	})
}

// What is fuzzed can succeed: else all that comes after a lease would never be
// reached.
func TestAGoodCallSucceeds(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make namespaces: sudo make test")
	}
	code, out, said := call(t, "ADD", "c1", "", []byte(good))
	if code != 0 || !strings.Contains(string(out), "10.240.0.5/16") {
		t.Errorf("exit %d: %s %s", code, out, said)
	}
	checkAnswer(t, "ADD", code, out)
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
