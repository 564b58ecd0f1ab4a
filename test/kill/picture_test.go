// Copyright (c) The azure-vnet authors. MIT licence.

package kill

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"azurevnet/internal/vnetsim"
	"azurevnet/test"
)

// lists is what ip is asked of a namespace, in one process.
const lists = `link show
address show
route show table all
rule show
neighbor show nud permanent
`

// picture is all that calls may change on a host and in the namespaces of its containers, as lines.
func picture(h test.Host, pods ...string) []string {
	h.T.Helper()
	var out strings.Builder
	if err := h.Do(func() error {
		out.WriteString("NFT\n" + sortElements(command("", "nft", "-s", "list", "ruleset")))
		legacy, _ := os.ReadFile("/proc/thread-self/net/ip_tables_names")
		if len(legacy) > 0 { // else the program would make the tables
			out.WriteString("IPTABLES\n" + counted.ReplaceAllString(command("", "iptables-legacy-save"), ""))
		}
		out.WriteString("NETWORK\n" + sorted(command(lists, "ip", "-o", "-d", "-batch", "-")))
		out.WriteString("FORWARDING\n" + sorted(command("", "bridge", "fdb")))
		out.WriteString("SETTINGS\n" + settings())
		return nil
	}); err != nil {
		h.T.Fatal(err)
	}
	root := fmt.Sprintf("/proc/%d/root", h.PidOne())
	for _, pod := range pods {
		if err := vnetsim.InNamespace(root+"/run/netns/"+pod, func() error {
			fmt.Fprintf(&out, "POD %s\n%s", pod, sorted(command(lists, "ip", "-o", "-batch", "-")))
			return nil
		}); err != nil {
			h.T.Fatal(err)
		}
	}
	return strings.Split(out.String()+"FILES\n"+files(root), "\n")
}

// passing matches differences between hosts that are alike: indexes, timers, and flags that the kernel sets a little
// later.
var passing = regexp.MustCompile(`(?m)^\d+: |@[\w-]+|link-netns\w* \S+| *\w*timer +[\d.]+|(port_no|port_id|designated_port|state|qdisc|tso_max_size) \S+|NO-CARRIER,|,LOWER_UP|(dead |linkdown )|-[0-9a-f]{8}-[0-9a-f-]{27}`)

// counted matches the counters and remarks of iptables-save.
var counted = regexp.MustCompile(`(?m)^#.*\n| \[\d+:\d+\]`)

// sorted are the lines of a listing without what passes, and without the IPv6 addresses that the kernel gives by itself
// in time.
func sorted(text string) string {
	lines := strings.Split(passing.ReplaceAllString(text, ""), "\n")
	slices.Sort(lines)
	return strings.Join(slices.DeleteFunc(lines, func(l string) bool { return l == "" || strings.Contains(l, "fe80::") || strings.Contains(l, "ff00::") }), "\n") + "\n"
}

var elements = regexp.MustCompile(`elements = \{([^}]*)\}`)

// sortElements brings the elements of sets, which the kernel hashes, into an order.
func sortElements(ruleset string) string {
	return elements.ReplaceAllStringFunc(ruleset, func(all string) string {
		var each []string
		for e := range strings.SplitSeq(elements.FindStringSubmatch(all)[1], ",") {
			each = append(each, strings.Join(strings.Fields(e), " "))
		}
		slices.Sort(each)
		return "elements = {\n\t\t\t" + strings.Join(each, "\n\t\t\t") + "\n\t\t}"
	})
}

// command is what a program prints in the calling thread's network namespace. One that fails prints its error.
func command(stdin, name string, arg ...string) string {
	cmd := exec.Command(name, arg...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Sprintf("%s: %v: %s\n", name, err, out)
	}
	return string(out)
}

// settings are the sysctls of the calling thread's network namespace that calls may change.
func settings() string {
	var out strings.Builder
	read := func(path string) {
		if value, err := os.ReadFile(path); err == nil {
			fmt.Fprintf(&out, "%s = %s\n", strings.TrimPrefix(path, "/proc/sys/net/"), strings.TrimSpace(string(value)))
		}
	}
	read("/proc/sys/net/ipv4/ip_forward")
	for _, pattern := range []string{"ipv4/conf/*/*", "ipv4/neigh/*/proxy_delay", "ipv6/conf/*/disable_ipv6", "ipv6/conf/*/accept_ra", "ipv6/conf/*/forwarding"} {
		all, _ := filepath.Glob("/proc/sys/net/" + pattern)
		for _, path := range all {
			read(path)
		}
	}
	return out.String()
}

// files are those that calls write, below the root of a VM. Two kinds of files are left out. Lock files are empty or
// name their last holder. A killed writer's temporary file in a directory of azure-vnet has a fixed name, and the next
// writer overwrites it.
func files(root string) string {
	var out strings.Builder
	for _, dir := range []string{"/run/azure-vnet", "/var/lib/azure-vnet", "/run/systemd/network", "/run/NetworkManager/conf.d"} {
		_ = filepath.WalkDir(root+dir, func(path string, e fs.DirEntry, err error) error {
			switch name := strings.TrimPrefix(path, root); {
			case err != nil || e.IsDir() || slices.Contains([]string{".lock", ".ask"}, filepath.Ext(name)):
			case filepath.Ext(name) == ".tmp" && strings.Contains(dir, "azure-vnet"):
			case filepath.Ext(name) == ".json":
				body, _ := os.ReadFile(path)
				fmt.Fprintf(&out, "%s %s\n", name, timeless(body))
			default:
				fmt.Fprintln(&out, name)
			}
			return nil
		})
	}
	return out.String()
}

// times are the keys in the files that tell when something was, or which address was lent last.
var times = []string{"freed", "since", "confirmed", "at", "until", "failedAt", "waited", "boot"}

// timeless is JSON without times.
func timeless(body []byte) string {
	var v any
	if err := json.Unmarshal(body, &v); err != nil {
		return err.Error() + ": " + string(body)
	}
	var strip func(v any)
	strip = func(v any) {
		switch v := v.(type) {
		case map[string]any:
			for _, key := range times {
				delete(v, key)
			}
			for key, e := range v {
				if strip(e); e == nil { // which is as good as not there
					delete(v, key)
				}
			}
		case []any:
			for _, e := range v {
				strip(e)
			}
		}
	}
	strip(v)
	out, _ := json.MarshalIndent(v, "", "  ")
	return string(out)
}
