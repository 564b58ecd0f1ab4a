// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// slowAgent is a host agent in the VM itself that answers what the true one
// does, a while later. It returns its URL.
func slowAgent(h test.Host, late time.Duration) string {
	h.T.Helper()
	path := "/machine/plugins?comp=nmagent&type=getinterfaceinfov1"
	ask := http.Client{Transport: &http.Transport{DialContext: h.DialContext, DisableKeepAlives: true}}
	var l net.Listener
	err := h.Do(func() (err error) {
		l, err = net.Listen("tcp4", "127.0.0.1:0")
		return err
	})
	if err != nil {
		h.T.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		time.Sleep(late) // the fault that is simulated
		answer, err := ask.Get("http://" + vnetsim.HostAgentAddr.String() + path)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		defer answer.Body.Close()
		_, _ = io.Copy(w, answer.Body)
	})}
	go server.Serve(l)
	h.T.Cleanup(func() { server.Close() })
	return "http://" + l.Addr().String() + path
}

// At boot nothing is known, no ADD comes to a node that is not ready, and STATUS
// alone can learn the addresses.
func TestSTATUSWaitsForTheFirstAnswer(t *testing.T) {
	t.Parallel() // it mostly waits
	_, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 2}, vnetsim.VMConfig{Secondaries: 2})
	t.Run("that another process asks for", func(t *testing.T) {
		n := test.OnNode(vms[0].In(t))
		n.Must("mkdir", "-p", "/run/azure-vnet")
		asker := n.Command(context.Background(), "flock", "/run/azure-vnet/leases.json.ask", "sh", "-c", "echo asked; sleep 2")
		out, err := asker.StdoutPipe()
		if err == nil {
			err = asker.Start()
		}
		if err == nil {
			_, err = out.Read(make([]byte, 1))
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := n.CNI.GetStatusNetworkList(t.Context(), n.List("1.1.0", "azure", test.Azure())); err != nil {
			t.Errorf("STATUS says: %v", err)
		}
		_ = asker.Wait()
	})
	t.Run("of a slow source", func(t *testing.T) {
		n := test.OnNode(vms[1].In(t))
		l := n.List("1.1.0", "azure", fmt.Sprintf(`{"type":"azure-vnet","ipam":{"type":"azure-vnet-ipam","environment":"wireserver","queryUrl":%q}}`, slowAgent(n.Host, 1500*time.Millisecond)))
		if err := n.CNI.GetStatusNetworkList(t.Context(), l); err != nil {
			t.Errorf("STATUS says: %v", err)
		}
		known := func() string { return n.Must("cat", "/run/azure-vnet/leases.json") }
		n.Must("sed", "-i", `s/"at":-\?[0-9]*/"at":-60000000000/g`, "/run/azure-vnet/leases.json") // older than the interval
		before := known()
		n.Must(n.Dir+"/azure-vnet", "reconcile")
		if known() == before {
			t.Error("reconcile asks for no news")
		}
	})
}

// What STATUS promises, ADD keeps: both look at one NIC and one subnet.
func TestSTATUSLooksAtTheNICThatADDTakes(t *testing.T) {
	t.Parallel()
	second := netip.MustParsePrefix("10.241.0.0/16")
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{NICs: []vnetsim.NICConfig{{Subnet: second, Secondaries: 2}}})
	n := test.OnNode(vms[0])
	for i, c := range []struct {
		name, plugin, says string
		ready              bool
	}{
		{"the primary has no addresses", test.Azure(), "az network nic ip-config create", false},
		{"the second has", test.Azure(`"master":"eth1"`), "", true},
		{"by its subnet", `{"type":"azure-vnet","ipam":{"type":"azure-vnet-ipam","subnet":"10.241.0.0/16"}}`, "", true},
		{"no NIC's subnet", `{"type":"azure-vnet","ipam":{"type":"azure-vnet-ipam","subnet":"10.9.0.0/16"}}`, "10.9.0.0/16", false},
		{"the subnet of another NIC", `{"type":"azure-vnet","master":"eth0","ipam":{"type":"azure-vnet-ipam","subnet":"10.241.0.0/16"}}`, "10.241.0.0/16", false},
		{"no such NIC", test.Azure(`"master":"eth7"`), "eth7", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := n.In(t)
			l, rt := n.List("1.1.0", "azure", c.plugin), n.Pod(fmt.Sprintf("p%d", i))
			err := n.CNI.GetStatusNetworkList(t.Context(), l)
			if (err == nil) != c.ready || !c.ready && !test.Says(err, 50, c.says) {
				t.Errorf("STATUS says: %v", err)
			}
			if _, _, err := n.TryAdd(l, rt); (err == nil) != c.ready {
				t.Errorf("ADD says: %v", err)
			}
			n.Del(l, rt)
		})
	}
	test.NothingDropped(t, vnet)
}
