// Copyright (c) The azure-vnet authors. MIT licence.

package main

import (
	"strings"
	"testing"
)

// argsOfPod is CNI_ARGS as kubelet's runtimes send it.
const argsOfPod = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=u1"

// rowOf is the line of a text that has the word, with single blanks.
func rowOf(text, word string) string {
	for line := range strings.Lines(text) {
		if strings.Contains(line, word) {
			return strings.Join(strings.Fields(line), " ")
		}
	}
	return ""
}

// TestStatusNamesPods beside the container's id, whoever lends the address, and after leases.json was lost.
func TestStatusNamesPods(t *testing.T) {
	ipam := otherIPAM(t)
	for _, tt := range []struct {
		name, args, conf string
		words            []string
		want             string // of the last word's text
	}{
		{"a pod", argsOfPod, host, []string{"ADD", "status"}, "10.240.0.5 cni/azure/c1/eth0 shop/web-0 " + link + " azure0"},
		{"a container of no pod", "", host, []string{"ADD", "status"}, "10.240.0.5 cni/azure/c1/eth0 " + link + " azure0"},
		{"with leases.json lost", argsOfPod, host, []string{"ADD", "lose-leases", "status"}, "10.240.0.5 cni/azure/c1/eth0 shop/web-0 " + link + " azure0"},
		{"with leases.json made anew", argsOfPod, host, []string{"ADD", "lose-leases", "reconcile", "status"}, "10.240.0.5 cni/azure/c1/eth0 shop/web-0 " + link + " azure0"},
		{"another IPAM", argsOfPod, strings.Replace(host, "azure-vnet-ipam", "other", 1), []string{"ADD", "status"}, "10.240.0.77 cni/azure/c1/eth0 shop/web-0 " + link + " azure0"},
		{"a name that no pod can have", "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web\x1b[2J 0", host, []string{"ADD", "status"}, "10.240.0.5 cni/azure/c1/eth0 " + link + " azure0"},
		{"what is broken", argsOfPod, host, []string{"ADD", "break-routes", "status"}, "broken: " + link + " (10.240.0.5, pod shop/web-0): no route in table 16863"},
		{"what is mended", argsOfPod, host, []string{"ADD", "break-routes", "reconcile"}, "mended: " + link + " (10.240.0.5, pod shop/web-0): no route in table 16863"},
		{"a lease that is found again", argsOfPod, host, []string{"ADD", "lose-leases", "reconcile"}, "leased again: 10.240.0.5, which cni/azure/c1/eth0 (pod shop/web-0) has"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			all := onOneHostWith(t, tt.args, "", tt.conf, ipam, tt.words...)
			if all[0].Code != 0 {
				t.Fatalf("ADD: code %d, %s", all[0].Code, all[0].Msg)
			}
			text := all[len(all)-1].Text
			if got := rowOf(text, tt.want[:strings.Index(tt.want, " ")]); got != tt.want {
				t.Errorf("got  %q\nwant %q in\n%s", got, tt.want, text)
			}
		})
	}
}
