// Copyright (c) The azure-vnet authors. MIT licence.

package lender

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"azurevnet/pool"
)

// The reader of a CNI error looks for the container that it is about.
func TestErrorsOfLeasesNameTheOwner(t *testing.T) {
	dir := t.TempDir()
	p, err := pool.New(pool.Config{Dir: filepath.Join(dir, "state"), Source: "imds"})
	if err != nil {
		t.Fatal(err)
	}
	// The pool cannot make its directory in the place of a file.
	if err := os.WriteFile(filepath.Join(dir, "state"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	l := &Lender{Pool: p}
	lease := pool.Lease{Addr: netip.MustParseAddr("10.240.0.5"), Owner: "cni/net/id/eth0"}
	for begin, err := range map[string]error{
		"confirm 10.240.0.5 for cni/net/id/eth0: ": l.Confirm(t.Context(), lease),
		"return 10.240.0.5 of cni/net/id/eth0: ":   l.Return(t.Context(), lease),
		"release 10.240.0.5 of cni/net/id/eth0: ":  l.Release(t.Context(), lease.Owner, lease.Addr),
	} {
		if cause := errors.Unwrap(err); cause == nil || err.Error() != begin+cause.Error() {
			t.Errorf("%v does not begin with %q", err, begin)
		}
	}
	_, err = l.leaseForOwner(context.Background(), pool.Request{Owner: lease.Owner, Prefix: netip.MustParsePrefix("10.240.0.7/16")})
	if want := "lease for cni/net/id/eth0: 10.240.0.7/16 and invalid Prefix must be without host bits"; err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
}
