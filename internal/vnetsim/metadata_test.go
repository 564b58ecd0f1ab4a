// Copyright (c) The azure-vnet authors. MIT licence.

package vnetsim

import (
	"context"
	"encoding/xml"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files")

const (
	hostAgentURL = "http://168.63.129.16/machine/plugins?comp=nmagent&type=getinterfaceinfov1"
	imdsURL      = "http://169.254.169.254/metadata/instance/network?api-version=2021-02-01"
)

type response struct {
	Status           int
	Type, RetryAfter string
	Body             string
	Chunked          bool
	Err              string // kind of error; empty: none
}

// get asks from within the VM.
func get(t *testing.T, vm *VM, url string, header ...string) response {
	t.Helper()
	// A black hole ends the dial. The huge document may take longer on a busy machine.
	dial := func(ctx context.Context, network, address string) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		return vm.DialContext(ctx, network, address)
	}
	client := http.Client{
		Timeout:   time.Minute,
		Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true, DisableCompression: true},
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range header {
		k, v, _ := strings.Cut(h, ": ")
		req.Header.Set(k, v)
	}
	r, err := client.Do(req)
	if err != nil {
		kind := err.Error()
		var timeout interface{ Timeout() bool }
		if errors.As(err, &timeout) && timeout.Timeout() {
			kind = "time-out"
		} else if errors.Is(err, syscall.ECONNREFUSED) {
			kind = "refused"
		}
		return response{Err: kind}
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response{Status: r.StatusCode, Type: r.Header.Get("Content-Type"), RetryAfter: r.Header.Get("Retry-After"),
		Body: string(body), Chunked: len(r.TransferEncoding) > 0}
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", name, diff)
	}
}

func TestSourcesTellEachVMItsAddresses(t *testing.T) {
	_, vms := newVNet(t, VMConfig{}, VMConfig{Secondaries: 2, NICs: []NICConfig{{Subnet: netip.MustParsePrefix("10.1.2.0/24"), Secondaries: 1}}})
	golden(t, "one-nic.xml", get(t, vms[0], hostAgentURL).Body)
	golden(t, "two-nics.xml", get(t, vms[1], hostAgentURL).Body)
	golden(t, "one-nic.json", get(t, vms[0], imdsURL, "Metadata: true").Body+"\n")
	golden(t, "two-nics.json", get(t, vms[1], imdsURL, "Metadata: true").Body+"\n")
	if err := vms[0].SetSecondaries([]netip.Addr{netip.MustParseAddr("10.240.1.1")}); err != nil {
		t.Fatal(err)
	}
	if got := get(t, vms[0], hostAgentURL).Body; !strings.Contains(got, `"10.240.1.1"`) {
		t.Errorf("an added address is not told: %s", got)
	}
}

func TestSourcesAskAsAzureDoes(t *testing.T) {
	_, vms := newVNet(t, VMConfig{})
	for url, tt := range map[string]struct {
		header []string
		want   int
	}{
		"http://168.63.129.16/machine/plugins": {nil, 404},
		"http://168.63.129.16/":                {nil, 404},
		hostAgentURL:                           {nil, 200},
		imdsURL:                                {nil, 400},
		imdsURL + "&":                          {[]string{"Metadata: true"}, 200},
		imdsURL + "&a":                         {[]string{"Metadata: true", "X-Forwarded-For: 10.0.0.1"}, 400},
		"http://169.254.169.254/metadata/instance/network":         {[]string{"Metadata: true"}, 400},
		"http://169.254.169.254/metadata/instance/x?api-version=x": {[]string{"Metadata: true"}, 404},
		"http://169.254.169.254/machine/plugins?comp=nmagent":      {nil, 400},
		"http://203.0.113.10/":                                     {nil, 200},
	} {
		if got := get(t, vms[0], url, tt.header...); got.Status != tt.want {
			t.Errorf("%s %q: %+v, want status %d", url, tt.header, got, tt.want)
		}
	}
	if got := get(t, vms[0], "http://203.0.113.10/").Body; got != vms[0].Public.String()+"\n" {
		t.Errorf("the internet saw %q, want %s", got, vms[0].Public)
	}
}

func TestFaults(t *testing.T) {
	v, vms := newVNet(t, VMConfig{Secondaries: 2})
	vm := vms[0]
	for source, url := range map[Source]string{HostAgent: hostAgentURL, IMDS: imdsURL} {
		healthy := get(t, vm, url, "Metadata: true")
		if healthy.Status != 200 || healthy.Chunked {
			t.Fatalf("%s healthy: %+v", source, healthy)
		}
		empty := map[Source]string{HostAgent: "<Interfaces/>", IMDS: `{"interface":[]}`}[source]
		with := func(change func(*response)) response {
			r := healthy
			change(&r)
			return r
		}
		plain := "text/plain; charset=utf-8"
		want := map[Fault]response{
			BlackHole: {Err: "time-out"},
			Refused:   {Err: "refused"},
			Status500: {Status: 500, Type: plain, Body: "Internal Server Error\n"},
			Status401: {Status: 401, Type: plain, Body: "Unauthorized\n"},
			Throttled: {Status: 429, Type: plain, Body: "Too Many Requests\n", RetryAfter: "1"},
			HTML:      with(func(r *response) { r.Type, r.Body = "text/html; charset=utf-8", "<!DOCTYPE html>" }),
			Truncated: with(func(r *response) { r.Body = r.Body[:len(r.Body)/2] }),
			Huge:      with(func(r *response) { r.Body = fmt.Sprint(len(r.Body) + 10<<20) }),
			Empty:     with(func(r *response) { r.Body = empty }),
			Chunked:   with(func(r *response) { r.Chunked = true }),
			Slow:      healthy,
			Stale:     {},
		}
		for _, f := range Faults {
			if err := v.SetFault(source, f); err != nil {
				t.Fatal(err)
			}
			got := get(t, vm, url, "Metadata: true")
			switch f {
			case HTML:
				got.Body, _, _ = strings.Cut(got.Body, "\n")
			case Huge:
				got.Body = fmt.Sprint(len(got.Body))
			case Stale:
				last := vm.Secondaries()[1].String()
				if got.Status != 200 || !strings.Contains(healthy.Body, last) || strings.Contains(got.Body, last) {
					t.Errorf("%s stale: %+v", source, got)
				}
				continue
			}
			if diff := cmp.Diff(want[f], got); diff != "" {
				t.Errorf("%s %s (-want +got):\n%s", source, f, diff)
			}
		}
		if err := v.SetFault(source, Healthy); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(healthy, get(t, vm, url, "Metadata: true")); diff != "" {
			t.Errorf("%s healthy again (-want +got):\n%s", source, diff)
		}
	}
}

func TestFaultIsOfOneVM(t *testing.T) {
	v, vms := newVNet(t, VMConfig{}, VMConfig{})
	if err := vms[0].SetFault(HostAgent, BlackHole); err != nil {
		t.Fatal(err)
	}
	if err := vms[0].SetFault(HostAgent, Refused); err != nil {
		t.Fatal(err)
	}
	if got := get(t, vms[0], hostAgentURL); got.Err != "refused" {
		t.Errorf("vm1: %+v, want refused", got)
	}
	if got := get(t, vms[1], hostAgentURL); got.Status != 200 {
		t.Errorf("vm2: %+v, want 200", got)
	}
	if got := get(t, vms[0], imdsURL, "Metadata: true"); got.Status != 200 {
		t.Errorf("imds: %+v, want 200", got)
	}
	if err := v.SetFault(HostAgent, Status500); err != nil {
		t.Fatal(err)
	}
	late, err := v.AddVM(VMConfig{})
	if err != nil {
		t.Fatal(err)
	}
	if got := get(t, late, hostAgentURL); got.Status != 500 {
		t.Errorf("a VM added later: %+v, want 500", got)
	}
}

func TestHugeDocumentIsTheRightOne(t *testing.T) {
	_, vms := newVNet(t, VMConfig{Secondaries: 1})
	if err := vms[0].SetFault(HostAgent, Huge); err != nil {
		t.Fatal(err)
	}
	var doc struct {
		Interface []struct {
			MacAddress string `xml:",attr"`
		}
	}
	if err := xml.Unmarshal([]byte(get(t, vms[0], hostAgentURL).Body), &doc); err != nil {
		t.Fatal(err)
	}
	if len(doc.Interface) != 1 || doc.Interface[0].MacAddress != bareMAC(vms[0].MAC) {
		t.Errorf("%+v", doc)
	}
}

func FuzzDNSReply(f *testing.F) {
	f.Add([]byte("\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x08internet\x04test\x00\x00\x01\x00\x01"))                              // the name that exists
	f.Add([]byte("\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x01\x01x\x00\x00\x1c\x00\x01\x00\x00\x29\x04\x00\x00\x00\x00\x00\x00\x00")) // another, AAAA, EDNS
	f.Add([]byte("\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\xc0\x0c"))                                                              // a loop
	f.Fuzz(func(t *testing.T, query []byte) {
		if reply := dnsReply(query); reply != nil && (len(reply) < 12 || reply[2]&0x80 == 0) {
			t.Errorf("%x is no reply", reply)
		}
	})
}
