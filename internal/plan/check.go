// Copyright (c) The azure-vnet authors. MIT licence.

package plan

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// noteExtras warns of what withoutExtras blanked.
func (r *report) noteExtras(remarks, ellipses []int) {
	at := slices.Concat(remarks, ellipses)
	if len(at) == 0 {
		return
	}
	var parts []string
	if len(remarks) > 0 {
		parts = append(parts, "its remarks (--> on "+r.linesOf(remarks)+")")
	}
	if len(ellipses) > 0 {
		parts = append(parts, "its ellipses (on "+r.linesOf(ellipses)+")")
	}
	r.warn(&value{offset: slices.Min(at)}, "this is no JSON, and was read without "+strings.Join(parts, " and "),
		"delete them before you give the file to the engine")
}

// linesOf returns the lines of offsets, each once, as text.
func (r *report) linesOf(offsets []int) string {
	var lines []string
	for _, offset := range offsets {
		line, _ := place(r.text, offset)
		lines = append(lines, strconv.Itoa(line))
	}
	lines = slices.Compact(lines)
	switch last := len(lines) - 1; {
	case last == 0:
		return "line " + lines[0]
	case last > 10:
		return fmt.Sprintf("%d lines from line %s to %s", last+1, lines[0], lines[last])
	default:
		return "lines " + strings.Join(lines[:last], ", ") + " and " + lines[last]
	}
}

// keysRead are the keys that Read uses. Two of them that differ in case only are one key for the engines. Other keys,
// such as the labels of nodes, may differ so.
var keysRead = []string{"properties", "orchestratorProfile", "orchestratorType", "kubernetesConfig", "networkPlugin", "networkPolicy", "clusterSubnet",
	"kubeletConfig", "maxPods", "masterProfile", "agentPoolProfiles", "name", "count", "osType", "availabilityProfile", "ipAddressCount",
	"vnetSubnetId", "agentVnetSubnetId", "vnetCidr", "firstConsecutiveStaticIP"}

// checkKeys warns of keys that an object has twice.
func (r *report) checkKeys(v *value) {
	first := map[string]*value{}
	for _, child := range v.children {
		if v.kind == '{' {
			key := child.name
			if i := slices.IndexFunc(keysRead, func(read string) bool { return strings.EqualFold(read, key) }); i >= 0 {
				key = keysRead[i]
			}
			if earlier := first[key]; earlier != nil {
				line, _ := place(r.text, earlier.offset)
				r.warn(child, fmt.Sprintf("this key is on line %d too, and the last one counts", line), "delete one of the two")
			}
			first[key] = child
		}
		r.checkKeys(child)
	}
}

// secretKeys are what the names of keys of secrets end with, in lower case.
var secretKeys = []string{"secret", "password", "passphrase", "privatekey", "privatekeys", "encryptionkey", "accesskey", "accountkey", "token", "connectionstring"}

// checkSecrets warns of secrets that are left in the definition. It never shows them.
func (r *report) checkSecrets(v *value) {
	named := v
	if v.parent != nil && v.parent.kind == '[' {
		named = v.parent // such as etcdPeerPrivateKeys
	}
	isSecret := slices.ContainsFunc(secretKeys, func(end string) bool { return strings.HasSuffix(strings.ToLower(named.name), end) })
	if v.kind == '"' && (isSecret && !isReference(v.text) || strings.Contains(v.text, "PRIVATE KEY-----")) {
		r.warn(v, "a secret is left in the file", "delete it, replace it wherever it is valid, and pass the new one when you deploy")
	}
	for _, child := range v.children {
		r.checkSecrets(child)
	}
}

// isReference is true of a value that only stands for a secret. It is empty, a word in angle brackets, a parameter of a
// template, or the id of a secret in a Key Vault.
func isReference(text string) bool {
	text = strings.ToLower(strings.TrimSpace(text))
	return text == "" ||
		strings.HasPrefix(text, "<") && strings.HasSuffix(text, ">") ||
		strings.HasPrefix(text, "[parameters(") ||
		strings.HasPrefix(text, "/subscriptions/") && strings.Contains(text, "/microsoft.keyvault/vaults/")
}

// isKubernetes notes whether the cluster is one of Kubernetes.
func (r *report) isKubernetes(properties *value) bool {
	orchestrator := properties.get("orchestratorProfile").get("orchestratorType")
	switch {
	case strings.EqualFold(orchestrator.text, "Kubernetes") && orchestrator.kind == '"':
		return true
	case !orchestrator.exists():
		r.fault(orchestrator, "the definition does not say what cluster it is of", `write "Kubernetes" if it is of Kubernetes`)
	default:
		r.add(orchestrator, Finding{kind: noPlan, Problem: fmt.Sprintf(`"%s" is not Kubernetes`, printable(orchestrator.text)),
			Remedy: "if its containers get addresses of the VNet, plan with --subnet, --nodes and --max-pods"})
	}
	return false
}

// checkPlugin notes whether the pods get addresses of the VNet. In the first releases of ACS-Engine, networkPolicy named
// the plugin. Later ones still read it if networkPlugin is missing.
func (r *report) checkPlugin(config *value) bool {
	plugin, policy := config.get("networkPlugin"), config.get("networkPolicy")
	deny := func(at *value, with string) bool {
		r.add(at, Finding{kind: noPlan, Problem: "with " + with + ", pods get no addresses of the VNet",
			Remedy: `write "azure" as networkPlugin if they are to have some`})
		return false
	}
	if name := r.textOf(plugin); name != "" {
		return strings.EqualFold(name, "azure") || deny(plugin, printable(name))
	}
	switch name := strings.ToLower(r.textOf(policy)); name {
	case "none", "calico":
		return deny(policy, "kubenet, which this networkPolicy means without a networkPlugin")
	case "cilium":
		return deny(policy, name)
	}
	return true
}

// textOf returns a string of the definition. It is empty if the key is missing. Another value than a string is a fault.
func (r *report) textOf(v *value) string {
	switch {
	case v.kind == '"':
		return v.text
	case v.exists():
		r.fault(v, "it is no string", "write it in quotes")
	}
	return ""
}

// integer returns a number of the definition. A missing one, and another value than a whole number, are faults.
func (r *report) integer(v *value, remedy string) (n int, ok bool) {
	const absurd = 1_000_000 // no count of a definition is so large, and no sum of them overflows
	if !v.exists() {
		r.fault(v, "it is missing", remedy)
		return 0, false
	}
	n, err := strconv.Atoi(v.text)
	if v.kind != '0' || err != nil || n < -absurd || n > absurd {
		r.fault(v, "it is no whole number, or too large", remedy+", without quotes")
		return 0, false
	}
	return n, true
}
