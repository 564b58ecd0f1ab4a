// Copyright (c) The azure-vnet authors. MIT licence.

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// These turn the test's program into the plugin, in namespaces of its own where nothing
// it does is seen.
const (
	asPlugin = "AZURE_VNET_TEST_AS_PLUGIN=1"     // make a host first
	onHost   = "AZURE_VNET_TEST_AS_PLUGIN=again" // a host is there
	verbs    = "AZURE_VNET_TEST_VERBS="          // serve these words on one host, one after the other
	oddity   = "AZURE_VNET_TEST_HOST="           // a key of oddities
)

func TestMain(m *testing.M) {
	key, _, _ := strings.Cut(asPlugin, "=")
	said := key + "=" + os.Getenv(key)
	if said != asPlugin && said != onHost {
		os.Exit(m.Run())
	}
	if said == asPlugin {
		if err := makeHost(); err != nil {
			os.Stderr.WriteString("panic: " + err.Error())
			os.Exit(2)
		}
	}
	if words := strings.Fields(os.Getenv(strings.TrimSuffix(verbs, "="))); said == asPlugin && len(words) > 0 {
		os.Exit(serveVerbs(words))
	}
	main()
}

// nics is what a source of the host's tells.
const nics = `{"Interfaces":[{"MacAddress":"000D3A047598","IsPrimary":true,"IPSubnets":[{"Prefix":"10.240.0.0/16","IPAddresses":[
	{"Address":"10.240.0.4","IsPrimary":true},{"Address":"10.240.0.5","IsPrimary":false},{"Address":"10.240.0.9","IsPrimary":false}]}]}]}`

// makeHost makes of this process's namespaces a host with a NIC, a source and a
// container's namespace, on which an ADD may succeed.
func makeHost() error {
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return err
	}
	for _, dir := range []string{"/run", "/var/log"} {
		if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
			return err
		}
	}
	if err := os.WriteFile("/run/nics.json", []byte(nics), 0o600); err != nil {
		return err
	}
	hw, _ := net.ParseMAC("00:0d:3a:04:75:98")
	eth0 := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0", HardwareAddr: hw}, PeerName: "fabric"} // kernels without dummy have this
	addr, _ := netlink.ParseAddr("10.240.0.4/16")
	for _, step := range []func() error{
		func() error { return netlink.LinkAdd(eth0) },
		func() error { return netlink.AddrAdd(eth0, addr) },
		func() error { return netlink.LinkSetUp(eth0) },
		func() error {
			return netlink.RouteAdd(&netlink.Route{LinkIndex: eth0.Index, Gw: net.IPv4(10, 240, 0, 1)})
		},
		func() error { return refuse(net.IPv4(168, 63, 129, 16)) }, // else each call would wait for an answer
		func() error { return refuse(net.IPv4(169, 254, 169, 254)) },
		makeNetns,
	} {
		if err := step(); err != nil {
			return err
		}
	}
	if odd := oddities[os.Getenv(strings.TrimSuffix(oddity, "="))]; odd != nil {
		return odd(eth0)
	}
	return nil
}

func refuse(ip net.IP) error {
	return netlink.RouteAdd(&netlink.Route{Dst: &net.IPNet{IP: ip, Mask: net.CIDRMask(32, 32)}, Type: syscall.RTN_UNREACHABLE})
}

// makeNetns makes /run/netns/c1.
func makeNetns() error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	own, err := netns.Get()
	if err != nil {
		return err
	}
	defer own.Close()
	c1, err := netns.NewNamed("c1")
	if err != nil {
		return err
	}
	c1.Close()
	return netns.Set(own)
}

// host is the configuration of a network on that host.
const host = `{"cniVersion":"1.1.0","name":"azure","type":"azure-vnet","ipam":{"type":"azure-vnet-ipam","environment":"/run/nics.json"}}`

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
	for _, seed := range []struct{ verb, netns, args, conf string }{ // on a host that can
		{"ADD", "/run/netns/c1", "", host},
		{"ADD", "/run/netns/c1", "IP=10.240.0.9;MAC=02:00:00:00:00:01", strings.Replace(host, "1.1.0", "0.2.0", 1)},
		{"ADD", "/run/netns/c1", "", strings.Replace(host, `"name"`, `"snat":"off","mtu":1400,"direct":["10.0.0.0/8"],"dns":{"nameservers":["10.0.0.10"]},"runtimeConfig":{"portMappings":[{"HostPort":8080,"ContainerPort":80}]},"name"`, 1)},
		{"STATUS", "", "", host},
	} {
		f.Add(seed.verb, "c1", seed.netns, "eth0", seed.args, []byte(seed.conf))
	}
	path := f.TempDir() // with no plugin in it: any program could be named
	f.Fuzz(func(t *testing.T, verb, id, netns, ifname, args string, conf []byte) {
		if strings.Contains(verb+id+netns+ifname+args, "\x00") || len(id+netns+args) > 100000 {
			t.Skip("the kernel passes no such environment")
		}
		code, out, stderr := call(t, []string{"CNI_PATH=" + path, "CNI_COMMAND=" + verb, "CNI_CONTAINERID=" + id, "CNI_NETNS=" + netns, "CNI_IFNAME=" + ifname, "CNI_ARGS=" + args}, conf)
		checkAnswer(t, verb, code, out)
		if strings.Contains(stderr, "panic") || strings.Contains(string(out), "panicked") {
			t.Errorf("a panic: %s %s", out, stderr)
		}
	})
}

// call runs the plugin on a host of its own.
func call(t *testing.T, env []string, conf []byte) (code int, out []byte, said string) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append([]string{asPlugin, "GORACE=atexit_sleep_ms=0", "PATH=" + os.Getenv("PATH")}, env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS}
	cmd.Stdin = bytes.NewReader(conf)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), stdout.Bytes(), stderr.String()
}

// What is fuzzed is a host on which a good call succeeds: else all that comes
// after a lease would never be reached.
func TestAGoodCallSucceeds(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make namespaces: sudo make test")
	}
	env := []string{"CNI_PATH=/nowhere", "CNI_COMMAND=ADD", "CNI_CONTAINERID=c1", "CNI_NETNS=/run/netns/c1", "CNI_IFNAME=eth0"}
	code, out, stderr := call(t, env, []byte(host))
	if code != 0 || !strings.Contains(string(out), "10.240.0.5/16") {
		t.Errorf("exit %d: %s %s", code, out, stderr)
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
