// Copyright (c) The azure-vnet authors. MIT licence.

package docker

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// said is what an error tells of a source that fails so.
var said = map[vnetsim.Fault]string{
	vnetsim.BlackHole: "no answer from",
	vnetsim.Refused:   "connection refused",
	vnetsim.Status500: "500",
	vnetsim.Status401: "401",
	vnetsim.Throttled: "429",
	vnetsim.HTML:      "it sent HTML",
	vnetsim.Truncated: "ends too early",
	vnetsim.Huge:      "longer than",
	vnetsim.Empty:     "it lists no NIC",
}

// TestWhatASourceSays: a source that fails in any way takes no address away, and is
// told of where one more is needed; one that answers is followed.
func TestWhatASourceSays(t *testing.T) {
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 1})
	h := vms[0]
	h.WithPlugin()
	h.Network("azure")
	one, other := h.Secondaries()[0], netip.MustParseAddr("10.240.0.77")
	list := func(t *testing.T, addrs ...netip.Addr) {
		t.Helper()
		if err := h.SetSecondaries(addrs); err != nil {
			t.Fatal(err)
		}
	}
	fail := func(t *testing.T, agent, imds vnetsim.Fault) {
		t.Helper()
		for source, fault := range map[vnetsim.Source]vnetsim.Fault{vnetsim.HostAgent: agent, vnetsim.IMDS: imds} {
			if err := h.SetFault(source, fault); err != nil {
				t.Fatal(err)
			}
		}
	}
	run := []string{"run", "--rm", "--network", "azure", "busybox", "true"}
	// refused waits until a run is with those words: a source is asked every two seconds.
	refused := func(t *testing.T, words ...string) {
		t.Helper()
		var err error
		defer func() {
			if t.Failed() {
				t.Logf("the last error: %v", err)
			}
		}()
		test.Eventually(t, "docker run says "+strings.Join(words, ", "), 25*time.Second, func() bool {
			start := time.Now()
			_, err = h.Try(test.Client, run...)
			if took := time.Since(start); took > 12*time.Second {
				t.Errorf("it took %v", took) // 10 s, and what the engine does
			}
			return err != nil && !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(err.Error(), w) })
		})
	}
	if got := h.Container("azure", "one", "sleep 100000"); got != one {
		t.Fatalf("one has %s", got)
	}
	t.Run("it fails", func(t *testing.T) {
		defer fail(t, vnetsim.Healthy, vnetsim.Healthy)
		time.Sleep(10 * time.Second) // until what is known is old
		for fault, words := range said {
			if !test.Soaking && fault != vnetsim.Refused && fault != vnetsim.HTML {
				continue // pool.TestFaultsOfTheSource has them all
			}
			fail(t, fault, fault)
			refused(t, "no free address", "wireserver: ", words, "imds: ")
		}
		holds(h.In(t), 1)
	})
	t.Run("an address is withdrawn while in use, and given back", func(t *testing.T) {
		h := h.In(t)
		list(t, other)
		test.Eventually(t, "a container gets the other address", 20*time.Second, func() bool {
			_, err := h.Try(test.Client, "run", "-d", "--init", "--network", "azure", "--name", "two", "busybox", "sleep", "100000")
			if err != nil {
				h.Try(test.Client, "rm", "-f", "two")
			}
			return err == nil
		})
		if got := h.Address("two"); got != other {
			t.Errorf("two has %s", got)
		}
		if out := h.Must(test.PluginBinary, "status"); !strings.Contains(out, one.String()+" is held by") || !strings.Contains(out, "though Azure lists it no more") {
			t.Errorf("status does not tell of the address that Azure took away:\n%s", out)
		} else if !regexp.MustCompile(other.String() + ` +docker/\S+ +two +azv`).MatchString(out) {
			t.Errorf("status does not name the container two:\n%s", out)
		}
		holds(h, 2)
		h.Docker("rm", "-f", "one")
		refused(t, "no free address")
		list(t, one, other)
		test.Eventually(t, "it is lent again", 20*time.Second, func() bool { _, err := h.Try(test.Client, run...); return err == nil })
	})
	t.Run("an address that still cools is lent with a warning", func(t *testing.T) {
		h := h.In(t)
		h.Docker(run...)
		if want := one.String() + " was released a moment ago and is lent again"; !strings.Contains(h.DockerLog(), want) {
			t.Errorf("the log does not say that %s", want)
		}
	})
	set := func(t *testing.T, settings ...string) error {
		t.Helper()
		h := h.In(t)
		h.Docker("plugin", "disable", "-f", test.Plugin)
		if _, err := h.Try(test.Client, append([]string{"plugin", "set", test.Plugin}, settings...)...); err != nil {
			return err
		}
		_, err := h.Try(test.Client, "plugin", "enable", test.Plugin)
		return err
	}
	const agent = "machine/plugins?comp=nmagent&type=getinterfaceinfov1"
	h.Must("sh", "-euc", fmt.Sprintf(`mkdir /run/agent
busybox wget -q -O /run/agent/list.xml 'http://%s/%s'
busybox httpd -p %s:8000 -h /run/agent
cat >/run/interfaces.json <<END
{"Interfaces":[{"MacAddress":"%s","IsPrimary":true,"IPSubnets":[{"Prefix":"%s","IPAddresses":[{"Address":"%s","IsPrimary":true},{"Address":"%s"}]}]}]}
END`, vnetsim.HostAgentAddr, agent, h.Primary, strings.ToUpper(strings.ReplaceAll(h.MAC, ":", "")), h.Prefix, h.Primary, one))
	t.Run("each is asked alone", func(t *testing.T) {
		if !test.Soaking {
			t.Skip("takes long: make soak")
		}
		defer fail(t, vnetsim.Healthy, vnetsim.Healthy)
		for _, c := range []struct {
			settings    []string
			agent, imds vnetsim.Fault
		}{
			{[]string{"SOURCE=imds"}, vnetsim.Refused, vnetsim.Healthy},
			{[]string{"SOURCE=wireserver"}, vnetsim.Healthy, vnetsim.Refused},
			{[]string{"SOURCE=wireserver", "QUERY_URL=http://" + h.Primary.String() + ":8000/list.xml"}, vnetsim.Refused, vnetsim.Refused},
			{[]string{"SOURCE=/run/interfaces.json", "QUERY_URL="}, vnetsim.Refused, vnetsim.Refused},
		} {
			h.Must("rm", "-f", "/run/azure-vnet/leases.json") // what is known, though not of whom
			fail(t, c.agent, c.imds)
			if err := set(t, c.settings...); err != nil {
				t.Errorf("%v: %v", c.settings, err)
				continue
			}
			h.In(t).Docker(run...)
			if out := h.Must(test.PluginBinary, "status"); strings.Count(out, "ago") != 1 {
				t.Errorf("%v: more than one source was asked:\n%s", c.settings, out)
			}
		}
	})
	t.Run("settings that do not go together are told to whoever starts a container, and are no end", func(t *testing.T) {
		h := h.In(t)
		if err := set(t, "SOURCE=/run/interfaces.json", "QUERY_URL=http://10.0.0.1/"); err != nil {
			t.Error(err)
		}
		h.Refused(run, "QUERY_URL=http://10.0.0.1/ (allowed: nothing beside a SOURCE that is a file", "docker plugin set azure-vnet:latest QUERY_URL= &&")
		if err := set(t, "SOURCE=auto", "QUERY_URL=", "COOL_DOWN=0s"); err != nil {
			t.Error(err)
		}
		h.Docker(run...)
	})
	h.Docker("rm", "-f", "two")
	h.Empty()
	test.NothingDropped(t, vnet)
}
