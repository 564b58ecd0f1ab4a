// Copyright (c) The azure-vnet authors. MIT licence.

package plan

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// TestDefinitionsOfTheEngines: each definition of testdata/clusters has its expected answer beside it. These were worked
// out by hand from the rules of Azure and of the engines, and not printed by this package.
func TestDefinitionsOfTheEngines(t *testing.T) {
	wants, err := filepath.Glob("testdata/clusters/*.want")
	if err != nil {
		t.Fatal(err)
	}
	if len(wants) != 10 {
		t.Errorf("%d definitions have an answer", len(wants))
	}
	for _, name := range wants {
		want := read(t, name)
		definition := strings.TrimSuffix(name, ".want")
		t.Run(filepath.Base(definition), func(t *testing.T) {
			if diff := cmp.Diff(string(want), Read(read(t, definition)).Text()); diff != "" {
				t.Errorf("(- by hand, + Read):\n%s", diff)
			}
		})
	}
}

func read(t *testing.T, name string) []byte {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// TestTheDocumentedExampleForPrograms compares the JSON form with one that was written by hand.
func TestTheDocumentedExampleForPrograms(t *testing.T) {
	got, err := Read(read(t, "testdata/clusters/documented-example.txt")).JSON()
	if diff := cmp.Diff(string(read(t, "testdata/documented-example.json")), string(got)); err != nil || diff != "" {
		t.Errorf("%v (- by hand, + JSON):\n%s", err, diff)
	}
}

// sound is a definition without a fault. Each edit of TestEachFaultHasItsPlace makes one line of it wrong.
const sound = `{
 "properties": {
  "orchestratorProfile": {
   "orchestratorType": "Kubernetes",
   "kubernetesConfig": {
    "clusterSubnet": "10.0.0.0/24",
    "kubeletConfig": {"--max-pods": "30"}
   }
  },
  "masterProfile": {
   "count": 3,
   "vnetSubnetId": "/subscriptions/S/resourceGroups/R/providers/Microsoft.Network/virtualNetworks/V/subnets/A",
   "vnetCidr": "10.0.0.0/16",
   "firstConsecutiveStaticIP": "10.0.0.239"
  },
  "agentPoolProfiles": [
   {
    "name": "one",
    "count": 1,
    "vnetSubnetId": "/subscriptions/S/resourceGroups/R/providers/Microsoft.Network/virtualNetworks/V/subnets/A"
   },
   {
    "name": "two",
    "count": 2,
    "vnetSubnetId": "/Subscriptions/s/resourcegroups/r/providers/microsoft.network/virtualnetworks/v/subnets/a"
   }
  ]
 }
}
`

// own is the id of the subnet in sound.
const own = "/subscriptions/S/resourceGroups/R/providers/Microsoft.Network/virtualNetworks/V/subnets/A"

// TestEachFaultHasItsPlace: each rule names the line and the column of the value that breaks it, and its key.
func TestEachFaultHasItsPlace(t *testing.T) {
	for _, tt := range []struct {
		name  string
		edits []string // old, new, …; of each the first place
		want  string   // a line for each finding
	}{
		{"nothing", nil, ""},
		{"keys in other cases", []string{`"count": 3`, `"COUNT": 3`, `vnetCidr`, `VNetCIDR`, `"masterProfile"`, `"MasterProfile"`}, ""},

		{"two masters", []string{`"count": 3`, `"count": 2`}, "11:13 wrong masterProfile.count: the engines make no cluster with 2 masters"},
		{"no masters", []string{`"count": 3`, `"count": 0`}, "11:13 wrong masterProfile.count: the engines make no cluster with 0 masters"},
		{"masters in quotes", []string{`"count": 3`, `"count": "3"`}, "11:13 wrong masterProfile.count: it is no whole number, or too large"},
		{"a count that is missing", []string{`"count": 3`, `"kount": 3`}, "10:20 wrong masterProfile.count: it is missing"},
		{"no object of masters", []string{`"masterProfile"`, `"mistressProfile"`}, "2:16 wrong masterProfile: there is no object masterProfile\n" +
			"20:21 wrong agentPoolProfiles[0].vnetSubnetId: this pool names a subnet, and the masters do not\n" +
			"25:21 wrong agentPoolProfiles[1].vnetSubnetId: this pool names a subnet, and the masters do not"},
		{"an empty pool", []string{`"count": 1`, `"count": 0`}, "19:14 wrong agentPoolProfiles[0].count: the engines make no pool of 0 nodes"},
		{"a pool of 101", []string{`"count": 2`, `"count": 101`, "10.0.0.0/24", "10.0.0.0/20", "10.0.0.239", "10.0.15.239"}, "24:14 wrong agentPoolProfiles[1].count: the engines make no pool of 101 nodes"},
		{"half a node", []string{`"count": 2`, `"count": 2.5`}, "24:14 wrong agentPoolProfiles[1].count: it is no whole number, or too large"},

		{"251 pods", []string{`"30"`, `"251"`}, "7:37 wrong orchestratorProfile.kubernetesConfig.kubeletConfig.--max-pods: a node has 1 to 250 pods, and not 251"},
		{"no pods", []string{`"30"`, `"0"`}, "7:37 wrong orchestratorProfile.kubernetesConfig.kubeletConfig.--max-pods: a node has 1 to 250 pods, and not 0"},
		{"pods without quotes", []string{`"30"`, `30`}, "7:37 wrong orchestratorProfile.kubernetesConfig.kubeletConfig.--max-pods: it is no string"},
		{"pods in words", []string{`"30"`, `"many"`}, "7:37 wrong orchestratorProfile.kubernetesConfig.kubeletConfig.--max-pods: it is no whole number"},
		{"257 addresses", []string{`"name": "one"`, `"ipAddressCount": 257`}, "18:23 wrong agentPoolProfiles[0].ipAddressCount: a node has 1 to 256 addresses, and not 257"},
		{"no address", []string{`"count": 3`, `"count": 3, "ipAddressCount": 0`}, "11:34 wrong masterProfile.ipAddressCount: a node has 1 to 256 addresses, and not 0"},
		{"fewer addresses than pods", []string{`"name": "one"`, `"ipAddressCount": 20`}, "18:23 warning agentPoolProfiles[0].ipAddressCount: a node gets addresses for 19 pods, and --max-pods is 30"},

		{"a subnet that is none", []string{"10.0.0.0/24", "10.0.0/24"}, `6:22 wrong orchestratorProfile.kubernetesConfig.clusterSubnet: "10.0.0/24" is no range of IPv4`},
		{"a subnet of IPv6", []string{"10.0.0.0/24", "fd00::/64"}, `6:22 wrong orchestratorProfile.kubernetesConfig.clusterSubnet: "fd00::/64" is no range of IPv4`},
		{"a subnet with host bits", []string{"10.0.0.0/24", "10.0.0.9/24"}, "6:22 warning orchestratorProfile.kubernetesConfig.clusterSubnet: 10.0.0.9/24 has host bits and is read as 10.0.0.0/24"},
		{"a subnet outside the VNet", []string{"10.0.0.0/16", "10.1.0.0/16"}, "6:22 wrong orchestratorProfile.kubernetesConfig.clusterSubnet: the subnet 10.0.0.0/24 is not inside vnetCidr, 10.1.0.0/16"},
		{"a subnet larger than the VNet", []string{"10.0.0.0/16", "10.0.0.0/25"}, "6:22 wrong orchestratorProfile.kubernetesConfig.clusterSubnet: the subnet 10.0.0.0/24 is not inside vnetCidr, 10.0.0.0/25"},
		{"a subnet outside the default VNet", []string{"10.0.0.0/24", "192.168.0.0/24", "10.0.0.239", "192.168.0.239", `"vnetCidr"`, `"other"`},
			"6:22 wrong orchestratorProfile.kubernetesConfig.clusterSubnet: the subnet 192.168.0.0/24 is not inside vnetCidr, 10.0.0.0/8, its default"},
		{"the default subnet outside the VNet", []string{`"clusterSubnet"`, `"other"`, "10.0.0.239", "10.255.255.239"},
			"13:16 wrong masterProfile.vnetCidr: clusterSubnet is missing, and its default 10.240.0.0/12 is not inside 10.0.0.0/16"},
		{"a subnet that Azure does not make", []string{"10.0.0.0/24", "10.0.0.0/30"}, "6:22 wrong orchestratorProfile.kubernetesConfig.clusterSubnet: Azure has no subnet as small as 10.0.0.0/30"},
		{"a VNet that is none", []string{"10.0.0.0/16", "10.0.0.0/33"}, `13:16 wrong masterProfile.vnetCidr: "10.0.0.0/33" is no range of IPv4`},
		{"a VNet with Azure's own address", []string{"10.0.0.0/16", "168.0.0.0/8", "10.0.0.0/24", "168.1.0.0/24", "10.0.0.239", "168.1.0.239"},
			"13:16 wrong masterProfile.vnetCidr: 168.0.0.0/8 contains 168.63.129.16, an address of Azure itself that nodes need"},
		{"a subnet with Azure's own address", []string{"10.0.0.0/24", "168.63.129.0/24", "10.0.0.239", "168.63.129.239", "10.0.0.0/16", "168.63.129.0/24"},
			"6:22 wrong orchestratorProfile.kubernetesConfig.clusterSubnet: 168.63.129.0/24 contains 168.63.129.16, an address of Azure itself that nodes need\n" +
				"13:16 wrong masterProfile.vnetCidr: 168.63.129.0/24 contains 168.63.129.16, an address of Azure itself that nodes need"},

		{"no static address", []string{`"firstConsecutiveStaticIP"`, `"other"`}, "10:20 wrong masterProfile.firstConsecutiveStaticIP: it is missing, and a cluster in a VNet of your own needs it"},
		{"a static address that is none", []string{"10.0.0.239", "10.0.0.256"}, `14:32 wrong masterProfile.firstConsecutiveStaticIP: "10.0.0.256" is no address of IPv4`},
		{"a static address outside", []string{"10.0.0.239", "10.0.1.9"}, "14:32 wrong masterProfile.firstConsecutiveStaticIP: 10.0.1.9 to 10.0.1.22 is not inside the subnet 10.0.0.0/24"},
		{"static addresses that end outside", []string{"10.0.0.239", "10.0.0.250"}, "14:32 wrong masterProfile.firstConsecutiveStaticIP: 10.0.0.250 to 10.0.1.7 is not inside the subnet 10.0.0.0/24"},
		{"static addresses up to the last", []string{"10.0.0.239", "10.0.0.242"}, "14:32 wrong masterProfile.firstConsecutiveStaticIP: 10.0.0.242 to 10.0.0.255 has addresses of 10.0.0.0/24 that Azure reserves: its first four and its last"},
		{"the gateway as static address", []string{"10.0.0.239", "10.0.0.1"}, "14:32 wrong masterProfile.firstConsecutiveStaticIP: 10.0.0.1 to 10.0.0.14 has addresses of 10.0.0.0/24 that Azure reserves: its first four and its last"},
		{"static addresses among the dynamic ones", []string{"10.0.0.239", "10.0.0.100"},
			"14:32 wrong masterProfile.firstConsecutiveStaticIP: Azure gives out 10.0.0.4 to 10.0.0.186, and may give a node or pod the masters' addresses from here on"},
		{"a static address right behind the dynamic ones", []string{"10.0.0.239", "10.0.0.187"}, ""},
		{"a static address that is the last dynamic one", []string{"10.0.0.239", "10.0.0.186"},
			"14:32 wrong masterProfile.firstConsecutiveStaticIP: Azure gives out 10.0.0.4 to 10.0.0.186, and may give a node or pod the masters' addresses from here on"},
		{"a static address of a scale set", []string{`"count": 3`, `"count": 3, "availabilityProfile": "VirtualMachineScaleSets"`},
			"14:32 wrong masterProfile.firstConsecutiveStaticIP: masters in a scale set have no static addresses"},

		{"a master without its subnet", []string{`"vnetSubnetId"`, `"other"`},
			"20:21 wrong agentPoolProfiles[0].vnetSubnetId: this pool names a subnet, and the masters do not\n" +
				"25:21 wrong agentPoolProfiles[1].vnetSubnetId: this pool names a subnet, and the masters do not"},
		{"a pool without its subnet", []string{`"name": "one",` + "\n" + `    "count": 1,` + "\n" + `    "vnetSubnetId"`, `"name": "one",` + "\n" + `    "count": 1,` + "\n" + `    "other"`},
			"17:4 wrong agentPoolProfiles[0].vnetSubnetId: this pool names no subnet, and the masters do"},
		{"an id without a subnet", []string{"/virtualnetworks/v/subnets/a", "/virtualnetworks/v"}, "25:21 wrong agentPoolProfiles[1].vnetSubnetId: this is no id of a subnet"},
		{"an id with a blank part", []string{"/resourcegroups/r/", "/resourcegroups//"}, "25:21 wrong agentPoolProfiles[1].vnetSubnetId: this is no id of a subnet"},
		{"another VNet", []string{"/virtualnetworks/v/", "/virtualnetworks/w/"}, "25:21 wrong agentPoolProfiles[1].vnetSubnetId: this subnet is in another VNet than the masters"},
		{"another subnet", []string{"/virtualnetworks/v/subnets/a", "/virtualnetworks/v/subnets/b"},
			"25:21 warning agentPoolProfiles[1].vnetSubnetId: this pool is in another subnet than the masters, and the definition does not say its size; the pool is counted as if it were in clusterSubnet"},

		{"a subnet too small", []string{"10.0.0.0/24", "10.0.0.0/25", "10.0.0.239", "10.0.0.100"}, "6:22 does not fit orchestratorProfile.kubernetesConfig.clusterSubnet: 197 addresses are needed, and 10.0.0.0/25 has 123"},
		{"no room for an upgrade", []string{`"count": 2`, `"count": 3`}, "6:22 warning orchestratorProfile.kubernetesConfig.clusterSubnet: an upgrade needs 31 addresses for one more node, and 23 are left"},
		{"more than a VNet has", []string{"10.0.0.0/24", "10.0.0.0/8", "10.0.0.0/16", "10.0.0.0/8", "10.0.0.239", "10.255.255.239",
			`"agentPoolProfiles": [`, `"agentPoolProfiles": [` + strings.Repeat(`{"count": 100, "ipAddressCount": 256, "vnetSubnetId": "`+own+`"},`, 3)},
			"6:22 does not fit orchestratorProfile.kubernetesConfig.clusterSubnet: 76,997 addresses are needed, and a VNet has at most 65,536"},

		{"Swarm", []string{"Kubernetes", "Swarm"}, `4:24 no plan orchestratorProfile.orchestratorType: "Swarm" is not Kubernetes`},
		{"no type", []string{"orchestratorType", "type"}, "3:26 wrong orchestratorProfile.orchestratorType: the definition does not say what cluster it is of"},
		{"kubenet by its policy", []string{`"clusterSubnet": "10.0.0.0/24"`, `"networkPolicy": "none"`},
			"6:22 no plan orchestratorProfile.kubernetesConfig.networkPolicy: with kubenet, which this networkPolicy means without a networkPlugin, pods get no addresses of the VNet"},
		{"flannel", []string{`"clusterSubnet": "10.0.0.0/24"`, `"networkPlugin": "flannel"`},
			"6:22 no plan orchestratorProfile.kubernetesConfig.networkPlugin: with flannel, pods get no addresses of the VNet"},
		{"Azure's network with Calico's policies", []string{`"clusterSubnet"`, `"networkPlugin": "azure", "networkPolicy": "calico", "clusterSubnet"`}, ""},
		{"kubenet and other faults", []string{`"clusterSubnet": "10.0.0.0/24"`, `"networkPlugin": "kubenet"`, `"count": 3`, `"count": 4`},
			"6:22 no plan orchestratorProfile.kubernetesConfig.networkPlugin: with kubenet, pods get no addresses of the VNet\n" +
				"11:13 wrong masterProfile.count: the engines make no cluster with 4 masters"},

		{"a key twice", []string{`"count": 3`, `"count": 3,` + "\n" + `"Count": 1`}, "12:10 warning masterProfile.Count: this key is on line 11 too, and the last one counts"},
		{"labels that differ in case", []string{`"count": 3`, `"count": 3, "customNodeLabels": {"App": "a", "app": "b"}`}, ""},
		{"no properties", []string{`"properties"`, `"property"`}, `1:1 no plan: it has no object "properties", so this is no definition of a cluster`},
		{"no comma", []string{`"count": 3,`, `"count": 3`}, "12:4 wrong: this is no JSON: invalid character '\"' after object value (expecting ',' or '}')"},
		{"half a file", []string{sound[strings.Index(sound, `"one"`):], ""}, "18:12 wrong: this is no JSON: the file ends too early"},
		{"text behind the end", []string{" }\n}\n", " }\n}\n\n  {}"}, "31:3 wrong: this is no JSON: the definition has ended before this"},
		{"many at once", []string{`"count": 3`, `"count": 4`, `"count": 1`, `"count": 0`, "10.0.0.0/16", "10.0.0.0/99", `"name": "two"`, `"adminPassword": "x"`},
			"11:13 wrong masterProfile.count: the engines make no cluster with 4 masters\n" +
				`13:16 wrong masterProfile.vnetCidr: "10.0.0.0/99" is no range of IPv4` + "\n" +
				"19:14 wrong agentPoolProfiles[0].count: the engines make no pool of 0 nodes\n" +
				"23:22 warning agentPoolProfiles[1].adminPassword: a secret is left in the file"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			text := sound
			for i := 0; i < len(tt.edits); i += 2 {
				if !strings.Contains(text, tt.edits[i]) {
					t.Fatalf("nothing to edit: %s", tt.edits[i])
				}
				text = strings.Replace(text, tt.edits[i], tt.edits[i+1], 1)
			}
			p := Read([]byte(text))
			var got []string
			faults := 0
			for _, f := range p.Findings {
				kind := f.kind
				if f.Warning {
					kind = "warning"
				} else {
					faults++
				}
				got = append(got, fmt.Sprintf("%s: %s", strings.TrimSpace(fmt.Sprintf("%d:%d %s %s", f.Line, f.Column, kind, f.Key)), f.Problem))
			}
			if diff := cmp.Diff(tt.want, strings.Join(got, "\n")); diff != "" {
				t.Errorf("(- want, + got):\n%s", diff)
			}
			if p.OK != (faults == 0) || p.OK != strings.HasPrefix(p.Answer, "fits: ") {
				t.Errorf("ok %v with %d faults: %s", p.OK, faults, p.Answer)
			}
		})
	}
}

// TestASecretIsNamedAndNeverShown: each secret is named by its place and key. A reference to a secret is not named.
func TestASecretIsNamedAndNeverShown(t *testing.T) {
	text := `{"properties": {
 "servicePrincipalProfile": {"clientId": "an-id", "secret": "hunter2hunter2"},
 "windowsProfile": {"adminPassword": "hunter2hunter2"},
 "certificateProfile": {"caPrivateKey": "hunter2hunter2", "etcdPeerPrivateKeys": ["hunter2hunter2", ""]},
 "orchestratorProfile": {"orchestratorType": "Kubernetes", "kubernetesConfig": {"etcdEncryptionKey": "hunter2hunter2"}},
 "extensionProfiles": [{"extensionParameters": "-----BEGIN RSA PRIVATE KEY-----hunter2hunter2"}],
 "a": {"secret": ""}, "b": {"secret": "<secret>"}, "c": {"keyvaultSecretRef": {"secretName": "name"}},
 "d": {"secret": "/subscriptions/S/resourceGroups/R/providers/Microsoft.KeyVault/vaults/V/secrets/N"},
 "e": {"secret": "[parameters('secret')]"}, "f": {"enableToken": true}, "secret": null
}}`
	p := Read([]byte(text))
	var got []string
	for _, f := range p.Findings {
		if strings.Contains(f.Problem, "secret") {
			got = append(got, fmt.Sprintf("%d:%d %s", f.Line, f.Column, f.Key))
		}
	}
	want := []string{"2:61 servicePrincipalProfile.secret", "3:38 windowsProfile.adminPassword", "4:41 certificateProfile.caPrivateKey",
		"4:83 certificateProfile.etcdPeerPrivateKeys[0]", "5:102 orchestratorProfile.kubernetesConfig.etcdEncryptionKey",
		"6:48 extensionProfiles[0].extensionParameters"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	neverShows(t, p, "hunter2")
	for i := range text { // whatever is left of the file, and whatever it breaks in
		neverShows(t, Read([]byte(text[:i])), "hunter2")
		neverShows(t, Read([]byte(text[:i]+text[i+1:])), "hunter2hunter")
	}
}

func neverShows(t *testing.T, p Plan, secret string) {
	t.Helper()
	form, err := p.JSON()
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(p.Text()+string(form), secret) {
		t.Fatalf("a secret is shown: %s", form)
	}
}

// TestRemarksAndEllipsesAreLeftOut: the text stays as long as it was, and strings stay as they are.
func TestRemarksAndEllipsesAreLeftOut(t *testing.T) {
	for _, tt := range []struct{ text, want string }{
		{"1 --> one\n", "1        \n"},
		{"1 --> one\r\n2", "1        \r\n2"},
		{`"-->…"`, `"-->…"`},
		{`"\"-->"`, `"\"-->"`},
		{"--> \"quoted\n1", "           \n1"},
		{"{…}", "{   }"},
		{"[1, …]", "[1     ]"},
		{"[…, 1]", "[     1]"},
		{"[...]", "[   ]"},
		{"[1, …, 2]", "[1     , 2]"},
		{"{\"a\": 1, --> rest\n…}", "{\"a\": 1          \n   }"},
	} {
		if clean, _, _ := withoutExtras([]byte(tt.text)); string(clean) != tt.want {
			t.Errorf("%q is %q, and should be %q", tt.text, clean, tt.want)
		}
	}
}

// TestAByteOrderMarkIsNoCharacter: Windows editors put one before the definition.
func TestAByteOrderMarkIsNoCharacter(t *testing.T) {
	text := "\ufeff" + strings.ReplaceAll(strings.Replace(sound, `"count": 3`, `"count": 2`, 1), "\n", "\r\n")
	if p := Read([]byte(text)); len(p.Findings) != 1 || p.Findings[0].Line != 11 || p.Findings[0].Column != 13 {
		t.Errorf("%+v", p.Findings)
	}
	if p := Read([]byte("\ufeff[]")); len(p.Findings) != 1 || p.Findings[0].Column != 1 {
		t.Errorf("%+v", p.Findings)
	}
}

// TestWhatAPoolSaysItself: a pool's own --max-pods and ipAddressCount count for its nodes alone, and the first key of
// ACS-Engine for pods is read.
func TestWhatAPoolSaysItself(t *testing.T) {
	text := strings.NewReplacer(
		`"kubeletConfig": {"--max-pods": "30"}`, `"maxPods": 10`,
		`"name": "one"`, `"name": "one", "kubernetesConfig": {"kubeletConfig": {"--max-pods": "20"}}`,
		`"name": "two"`, `"name": "two", "ipAddressCount": 16`).Replace(sound)
	p := Read([]byte(text))
	want := []Nodes{{"masters", 3, 11, false}, {"one", 1, 21, false}, {"two", 2, 16, false}}
	if diff := cmp.Diff(want, p.Sizes.Nodes, cmp.AllowUnexported(Nodes{})); diff != "" {
		t.Error(diff)
	}
	// 3·11 + 21 + 2·16 + 11 = 97 of 251. The 154 that are left hold 7 nodes of the largest pool.
	if want := "fits: 97 of 251 addresses used; 7 more nodes fit, of 21 addresses each"; p.Answer != want {
		t.Errorf("%s\nand not %s", p.Answer, want)
	}
}

// TestAPlanWithoutADefinition: what azure-vnetctl plan --subnet answers. A /24 with 30 pods holds 8 nodes.
func TestAPlanWithoutADefinition(t *testing.T) {
	for _, tt := range []struct {
		subnet         string
		masters, nodes int
		want           string
	}{
		{"10.0.0.0/20", 0, 3, "fits: 93 of 4,091 addresses used; 128 more nodes fit"},
		{"10.0.0.0/24", 0, 7, "fits: 217 of 251 addresses used; 1 more node fits"},
		{"10.0.0.0/24", 0, 8, "fits: 248 of 251 addresses used; 0 more nodes fit"},
		{"10.0.0.0/24", 0, 9, "does not fit: 279 addresses are needed, and 10.0.0.0/24 has 251; make the subnet a /23 or larger, or lower the number of nodes or --max-pods"},
		{"10.0.0.0/24", 1, 7, "fits: 248 of 251 addresses used; 0 more nodes fit"},
		{"10.0.0.0/24", 3, 4, "fits: 228 of 251 addresses used; 0 more nodes fit"}, // with 1 and 10 for the masters
		{"10.0.0.0/29", 0, 1, "does not fit: 31 addresses are needed, and 10.0.0.0/29 has 3; make the subnet a /25 or larger, or lower the number of nodes or --max-pods"},
		{"10.0.0.0/8", 0, 2115, "does not fit: 65,565 addresses are needed, and a VNet has at most 65,536; lower the number of nodes or --max-pods"},
	} {
		p := Size(Cluster{Subnet: netip.MustParsePrefix(tt.subnet), Masters: Nodes{"masters", tt.masters, 31, false}, Pools: []Nodes{{"nodes", tt.nodes, 31, false}}})
		if p.Answer != tt.want || p.OK != strings.HasPrefix(tt.want, "fits") {
			t.Errorf("%s with %d and %d: %v %s\nand not %s", tt.subnet, tt.masters, tt.nodes, p.OK, p.Answer, tt.want)
		}
	}
}

// TestMoreNodesAreExact: with as many more nodes as it says, the cluster fits, and with one more it does not.
func TestMoreNodesAreExact(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := Cluster{
			Subnet:  netip.PrefixFrom(netip.MustParseAddr("10.0.0.0"), rapid.IntRange(8, 29).Draw(t, "bits")),
			Masters: Nodes{"masters", rapid.SampledFrom([]int{0, 1, 3, 5}).Draw(t, "masters"), 31, false},
			Pools:   []Nodes{{"pool", rapid.IntRange(1, 300).Draw(t, "nodes"), 1 + rapid.IntRange(1, 250).Draw(t, "pods"), false}},
		}
		p := Size(c)
		if !p.OK {
			return
		}
		c.Pools[0].Count += p.Sizes.MoreNodes
		if more := Size(c); !more.OK || more.Sizes.MoreNodes != 0 {
			t.Fatalf("%s, but then %s", p.Answer, more.Answer)
		}
		if c.Pools[0].Count++; Size(c).OK {
			t.Fatalf("%s, but one more fits too", p.Answer)
		}
	})
}
