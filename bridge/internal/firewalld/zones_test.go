// Copyright (c) The azure-vnet authors. MIT licence.

package firewalld

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// host is a firewalld with the zones of its links in words: "eth0=public azure0=work".
func host(fallback, links string) *Zones {
	z := &Zones{defaultZone: fallback, zoneOfLink: map[string]string{}, zones: map[string]zone{
		"public":   {forwards: true},
		"work":     {forwards: true},
		"closed":   {},
		"old":      {old: true},
		"external": {forwards: true, masquerades: true},
		"trusted":  {forwards: true, accepts: true},
		"open":     {forwards: true, accepts: true},
	}}
	for _, word := range strings.Fields(links) {
		link, name, _ := strings.Cut(word, "=")
		z.zoneOfLink[link] = name
	}
	return z
}

// Each link of ours is in the zone that its NIC is in by name, unless that would open anything but the way between them
// or somebody put it elsewhere.
func TestSteps(t *testing.T) {
	azure0 := map[string][]string{"azure0": {"eth0"}}
	azv := map[string][]string{"azv+": {"eth0", "eth1"}}
	ours := func(zone string) map[string]string { return map[string]string{"azure0": zone} }
	for name, test := range map[string]struct {
		is     *Zones
		links  map[string][]string
		joined map[string]string
		want   []string
	}{
		"no NIC":                               {host("public", ""), map[string][]string{"azure0": nil}, nil, nil},
		"the NIC is away":                      {host("public", "azure0=work"), map[string][]string{"azure0": nil}, ours("work"), nil},
		"in no zone":                           {host("public", "eth0=work"), azure0, nil, []string{"join azure0 work"}},
		"joined":                               {host("public", "eth0=work azure0=work"), azure0, ours("work"), nil},
		"reloaded":                             {host("public", "eth0=work"), azure0, ours("work"), []string{"join azure0 work"}},
		"the NIC moved":                        {host("public", "eth0=public azure0=work"), azure0, ours("work"), []string{"leave azure0 work"}}, // and then it is in no zone
		"the NIC by how its name begins":       {host("public", "eth+=work"), azure0, nil, []string{"join azure0 work"}},
		"the NIC by two beginnings":            {host("public", "e+=closed eth+=work"), azure0, nil, []string{"join azure0 work"}},
		"somebody's, by how its name begins":   {host("public", "eth0=public azure+=work"), azure0, nil, nil},
		"somebody's":                           {host("public", "eth0=public azure0=work"), azure0, nil, nil},
		"somebody's, as ours would be":         {host("public", "eth0=public azure0=public"), azure0, nil, nil},
		"somebody moved ours":                  {host("public", "eth0=public azure0=work"), azure0, ours("public"), []string{"forget azure0 public"}},
		"somebody's is told nothing":           {host("public", "azure0=work"), azure0, nil, nil},
		"by default":                           {host("public", ""), azure0, nil, []string{"tell azure0 --zone=public --add-interface=eth0"}},
		"by default since":                     {host("public", "azure0=public"), azure0, ours("public"), []string{"leave azure0 public", "tell azure0 --zone=public --add-interface=eth0"}},
		"by default, and reloaded since":       {host("public", ""), azure0, ours("public"), []string{"forget azure0 public", "tell azure0 --zone=public --add-interface=eth0"}},
		"forward=no":                           {host("public", "eth0=closed"), azure0, nil, []string{"tell azure0 --zone=closed --add-forward"}},
		"forward=no since":                     {host("public", "eth0=closed azure0=closed"), azure0, ours("closed"), []string{"leave azure0 closed", "tell azure0 --zone=closed --add-forward"}},
		"firewalld 0.8":                        {host("public", "eth0=old"), azure0, nil, []string{"tell azure0 Update it"}},
		"trusted":                              {host("public", "eth0=trusted"), azure0, nil, []string{"tell azure0 --zone=trusted --add-interface=azure0"}},
		"a zone like trusted":                  {host("public", "eth0=open"), azure0, nil, []string{"tell azure0 --zone=open --add-interface=azure0"}},
		"trusted by default":                   {host("trusted", ""), azure0, nil, nil},
		"trusted by name and by default":       {host("trusted", "eth0=trusted"), azure0, nil, nil},
		"trusted by default, the NIC by name":  {host("trusted", "eth0=public"), azure0, nil, []string{"join azure0 public"}},
		"the zone masquerades":                 {host("public", "eth0=external"), azure0, nil, []string{"join azure0 external", "tell azure0 --zone=external --remove-masquerade"}},
		"transparent on two NICs":              {host("public", "eth0=work eth1=work"), azv, nil, []string{"join azv+ work"}},
		"transparent on two NICs of two zones": {host("public", "eth0=work eth1=public"), azv, nil, []string{"tell azv+ cannot be in both"}},
		"nobody asks for it any more":          {host("public", "eth0=public azure7=public"), nil, map[string]string{"azure7": "public"}, []string{"leave azure7 public"}},
		"nobody asks, and reloaded":            {host("public", "eth0=public"), nil, map[string]string{"azure7": "public"}, []string{"forget azure7 public"}},
	} {
		t.Run(name, func(t *testing.T) {
			got := test.is.Steps(test.links, test.joined)
			var words []string
			for i, s := range got {
				act := map[Act]string{Join: "join", Leave: "leave", ForgetZone: "forget", Report: "tell"}[s.Act]
				if s.Act != Report {
					words = append(words, fmt.Sprintf("%s %s %s", act, s.Link, s.Zone))
					continue
				}
				said := s.What
				if i < len(test.want) {
					if _, part, _ := strings.Cut(strings.TrimPrefix(test.want[i], "tell "), " "); strings.Contains(said, part) {
						said = part
					}
				}
				words = append(words, "tell "+s.Link+" "+said)
			}
			if diff := cmp.Diff(test.want, words); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// A bus that accepts and says nothing is left after two seconds.
func TestASilentBus(t *testing.T) {
	bus := filepath.Join(t.TempDir(), "bus")
	l, err := net.Listen("unix", bus)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	begun := time.Now()
	err = visitBus(context.Background(), bus, func(*daemon) error { return nil })
	if err == nil || !strings.Contains(err.Error(), "gave no answer within 2s") {
		t.Errorf("a silent bus: %v", err)
	}
	if took := time.Since(begun); took > busTimeout+time.Second {
		t.Errorf("it was waited for %v", took)
	}
}

// A bus that could start firewalld is not made to.
func TestFirewalldIsNotStarted(t *testing.T) {
	dir := t.TempDir()
	bus, started := filepath.Join(dir, "bus"), filepath.Join(dir, "started")
	for name, text := range map[string]string{
		"bus.conf": `<busconfig><type>session</type><listen>unix:path=` + bus + `</listen><servicedir>` + dir + `</servicedir>
<policy context="default"><allow send_destination="*"/><allow receive_sender="*"/><allow own="*"/><allow user="*"/></policy></busconfig>`,
		busName + ".service": "[D-BUS Service]\nName=" + busName + "\nExec=/usr/bin/touch " + started + "\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	daemon := exec.Command("dbus-daemon", "--nofork", "--config-file="+filepath.Join(dir, "bus.conf"))
	if err := daemon.Start(); err != nil {
		t.Skip(err)
	}
	defer func() { _ = daemon.Process.Kill(); _ = daemon.Wait() }()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(bus); err == nil {
			break
		}
	}
	_, err := readZones(t.Context(), bus)
	if err == nil || !strings.Contains(err.Error(), "it does not run") {
		t.Errorf("without firewalld: %v", err)
	}
	if _, err := os.Stat(started); err == nil {
		t.Error("it was started")
	}
}
