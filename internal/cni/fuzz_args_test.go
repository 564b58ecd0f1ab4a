// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"maps"
	"slices"
	"strings"
	"testing"
	"unicode"

	"github.com/google/go-cmp/cmp"
)

// FuzzArgs reads any CNI_ARGS. A part of the form KEY=VALUE is read, and reading it again gives the same. Any other
// part is named in the error. The pod's name fits a line of the log and a word of an alias.
func FuzzArgs(f *testing.F) {
	for _, args := range []string{
		"", ";", "=", "a", "a=b=c", "IgnoreUnknown=1;IgnoreUnknown=1", " IP = 10.0.0.9 ;MAC=02:00:00:00:00:05",
		"K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-1;K8S_POD_INFRA_CONTAINER_ID=pod04;K8S_POD_UID=6f1c0000-0000-4000-8000-000000000001;IgnoreUnknown=1", // containerd
		"IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-1;K8S_POD_INFRA_CONTAINER_ID=pod04",                                                  // CRI-O
		"K8S_POD_NAMESPACE=a\nb;K8S_POD_NAME=c\u2028d", "K8S_POD_NAME=" + strings.Repeat("w", 400), "AZURE_VNET_ATTACH=1;K8S_POD_NAME=\xff",
	} {
		f.Add(args)
	}
	f.Fuzz(func(t *testing.T, args string) {
		said, err := parseArgs(args)
		odd := slices.ContainsFunc(strings.Split(args, ";"), func(pair string) bool { return pair != "" && !strings.Contains(pair, "=") })
		if (err != nil) != odd || err != nil && !strings.Contains(err.Error(), "is not KEY=VALUE") {
			t.Errorf("%q: %v", args, err)
		}
		if err == nil {
			var pairs []string
			for _, key := range slices.Sorted(maps.Keys(said)) {
				pairs = append(pairs, key+"="+said[key])
			}
			again, err := parseArgs(strings.Join(pairs, ";"))
			if diff := cmp.Diff(said, again); err != nil || diff != "" {
				t.Errorf("%q is read again as another: %v\n%s", args, err, diff)
			}
		}
		pod := podOf(said)
		odd = strings.ContainsFunc(pod, func(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) })
		if odd || len(pod) > 317 || pod != "" && pod != said["K8S_POD_NAMESPACE"]+"/"+said["K8S_POD_NAME"] {
			t.Errorf("%q is of pod %q", args, pod)
		}
		c, err := readConf([]byte(least+"}"), args, mainPlugin)
		if err == nil && (c.Addr.IsValid() && !c.Addr.Is4() || c.MAC != nil && (len(c.MAC) != 6 || c.MAC[0]&1 != 0)) {
			t.Errorf("%q asks for %s and %s", args, c.Addr, c.MAC)
		}
		if err != nil && !strings.Contains(err.Error(), inArgs) {
			t.Errorf("the error does not say that CNI_ARGS is wrong: %v", err)
		}
	})
}
