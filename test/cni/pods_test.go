// Copyright (c) The azure-vnet authors. MIT licence.

package cni

import (
	"regexp"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// TestPodsInStatusAndInTheLog, as containerd names them: status has the pod beside the container's id, and counts each
// ipconfig once. A pod that finds no address, and that is tried again as kubelet does, is one line of the log for
// ADD and one for the DEL that follows each.
func TestPodsInStatusAndInTheLog(t *testing.T) {
	t.Parallel()
	vnet, vms := test.NewVNet(t, vnetsim.VMConfig{Secondaries: 1})
	n := withContainerd(test.OnNode(vms[0]), documented)
	id, addr := n.run("web", 0)
	told := n.Must(n.Dir+"/azure-vnet", "status")
	for _, want := range []string{
		regexp.QuoteMeta(addr.String()) + ` +cni/azure/` + id + `/eth0 +default/web +azv[0-9a-f]{11} +azure0`,
		regexp.QuoteMeta(n.MAC) + ` +10\.240\.0\.0/16 +2 ipconfigs: 1 the NIC's own, 1 held\n`,
	} {
		if !regexp.MustCompile(want).MatchString(told) {
			t.Errorf("status has no line %s:\n%s", want, told)
		}
	}
	const tries = 5
	for range tries {
		_, err := n.cri.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: sandbox("more", 0)})
		if err == nil || !strings.Contains(err.Error(), "2 ipconfigs: 1 the NIC's own, 1 held") {
			t.Fatalf("one pod too many: %v", err)
		}
	}
	var of []string // lines of the pod that finds no address
	for line := range strings.Lines(n.Must("cat", "/var/log/azure-vnet.log") + "\n") {
		if strings.Contains(line, "pod=default/more") {
			of = append(of, line)
		} else if !strings.Contains(line, "container="+id+" ifname=eth0 ") || !strings.Contains(line, "pod=default/web ") {
			t.Errorf("a line names no pod: %s", line)
		}
	}
	if len(of) != 2 || !regexp.MustCompile(`level=ERROR .*verb=ADD .* container=[0-9a-f]{64} .*no free address.* times=5 *\n`).MatchString(of[0]) ||
		!regexp.MustCompile(`level=INFO .*verb=DEL .* container=[0-9a-f]{64} .* times=5 *\n`).MatchString(of[1]) {
		t.Errorf("%d tries have the lines\n%s", tries, strings.Join(of, ""))
	}
	n.remove(id)
	n.Bare()
	test.NothingDropped(t, vnet)
}
