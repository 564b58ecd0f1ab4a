// Copyright (c) The azure-vnet authors. MIT licence.

package pool

import (
	"fmt"
	"os"
	"testing"
)

// BenchmarkLease lends the last address of a NIC whose other 254 are held. Each
// turn puts the file back as it was, which costs a tenth of it.
func BenchmarkLease(b *testing.B) {
	p, _ := full(b)
	before, err := os.ReadFile(p.path)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := p.Lease(b.Context(), Request{Owner: "cni/azure/0123456789abcdef/eth0"}); err != nil {
			b.Fatal(err)
		}
		if err := os.WriteFile(p.path, before, 0o600); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkConfirm reads 254 leases and writes nothing.
func BenchmarkConfirm(b *testing.B) {
	p, l := full(b)
	for b.Loop() {
		if err := p.Confirm(b.Context(), l); err != nil {
			b.Fatal(err)
		}
	}
}

// full is a pool of 255 addresses with one left, and its last lease. It lies in
// memory, as /run does.
func full(b *testing.B) (*Pool, Lease) {
	dir, err := os.MkdirTemp("/dev/shm", "pool")
	if err != nil {
		b.Skipf("no memory file system: %v", err)
	}
	b.Cleanup(func() { os.RemoveAll(dir) })
	p := poolIn(b, azure(nic(mac1, "10.240.0.0/16", 256)), dir)
	var l Lease
	for i := range 254 {
		l = p.must(b, Request{Owner: fmt.Sprintf("cni/azure/%064d/eth0", i)})
	}
	return p, l
}
