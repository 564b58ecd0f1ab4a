// Copyright (c) The azure-vnet authors. MIT licence.

package repository

import (
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"path/filepath"
	"strings"
	"testing"
)

// retired has the names that meant two things, by package. Each has the name that took its place. docs/words.md says
// what each word means.
var retired = map[string]map[string]string{
	"bridge": {
		"HeldError": "InUseError", "Forget": "DeleteFlows", "Learn": "LearnPolicy",
		"Present": "CheckPresent", "Permitted": "CheckPermitted", "Ready": "CheckReady", "hook": "beforeStep",
		"lock": "lockHost", "renew": "startNewBoot", "asked": "isAsked",
		"checkStandingBridge": "checkExistingBridgeName", "adopt": "completeFromLinks",
		"firstRule": "lowestOtherPriority", "rulesOf": "rulesetEndpoint", "holds": "linkWithAddress",
		"linkTo": "linkToContainer", "ownWay": "wayOut", "leadsNowhere": "isGoneOrDown",
		"listens": "refuseListening", "defaultLink": "defaultRouteLink", "leadsOut": "mayLeadOut",
		"bridgeOf": "bridgeAliasOf", "bridgesIn": "ourBridges", "takesPorts": "hasPorts",
		"endpointOf": "endpointAliasOf", "isUpstreams": "mayBeUpstreams", "sourceOf": "hostSourceOf",
		"leadOut": "addSourceTable", "delLink": "deleteLink", "delRoute": "deleteRoute", "doIn": "runInNamespace",
		"writeIfThere": "writeIfExists", "forgetDatagrams": "deleteUDPFlows", "forgetFlows": "deleteFlows",
		"normalPorts": "normalizedPorts", "mendAll": "doRound", "brokenOfOurs": "faultsOfOurs",
		"brokenForTheFirst": "faultsBeforeFirstUse", "brokenWait": "brokenLockWait", "passes": "maxPasses",
		"unask": "withdrawAsked", "delAddr": "deleteAddr", "sweep": "removeUnasked",
		"sweepAll": "removeAllButLinks", "manyPolicies": "policiesBeforeForgetting", "clearOld": "removeLeftovers",
		"macIsFree": "refuseUsedMAC", "leadable": "mayHaveElements", "noWay": "unreachableMetric",
		"relearn": "readLinkKinds", "standing": "whole", "away": "InContainer",
	},
	"bridge/internal/rtnl": {
		"Named": "ByName", "NotThere": "IsNotExist", "MayChange": "HasNetAdmin", "ReadFar": "ReadLinkInNamespace",
		"ndmsg": "the layout file's accessors",
	},
	"bridge/internal/nfnl": {
		"ForwardChains": "ReadForwardChains",
	},
	"bridge/internal/listen": {
		"At": "Addr",
	},
	"bridge/internal/ruleset": {
		"Drop": "DeleteTables", "Stands": "TablesExist", "Part": "OptionalTable",
		"noModule": "explainMissingModule", "be16": "bigEndian16", "be32host": "hostEndian32", "spans": "rangesOf",
		"one": "oneExpression",
	},
	"bridge/internal/forward": {
		"Drop": "RemoveAll", "Foreign": "DroppingChains", "ours": "ourChain",
		"placed": "jumpIsInPlace", "onward": "ruleTarget", "everything": "unconditionalRule", "printed": "ruleText",
	},
	"bridge/internal/firewalld": {
		"Tell": "Report", "Forget": "ForgetZone", "in": "namedZone", "patience": "busTimeout",
		"visit": "visitBus",
	},
	"bridge/internal/ebtables": {
		"list": "listRules", "find": "findProgram",
	},
	"cmd/azure-vnet": {
		"tell": "printStatus", "hear": "refreshNICs", "own": "lendsHere", "obtain": "getAddress",
		"delegate": "delegateAddress", "delegated": "delegateVerb", "installed": "checkInstalled", "given": "grant",
		"plain": "configuredKeys", "claimed": "hasOurResult", "claimEarlier": "moveEarlierResults",
		"attachedEarlier": "isEarlierAttach", "isAttachs": "attachMade", "ipNet": "lender.IPNet", "clearLeftover": "removeLeftover", "misnamed": "codeMisnamed",
		"inside": "openContainer", "sweep": "sweepLinkless", "endUpstreams": "removeUpstreamLink",
		"takeAway": "removeOwners", "addressable": "checkCanAddress",
	},
	"cmd/azure-vnet-ipam": {
		"checkHeld": "checkLeases",
	},
	"internal/cni": {
		"wrong": "Errorf", "IsAttached": "AttachedByWord", "removing": "removeAndUnlock",
		"unwritable": "explainUnwritable", "validSaid": "listsValid", "oldest": "oldestVersion",
	},
	"internal/plugin": {
		"beSeen": "lockPlugin", "linkOf": "findLink", "begin": "start", "loop": "reconcileUntilDone", "mend": "reconcileOnce",
		"tell": "logFailure", "compareOnce": "compareNetworksOnce", "leavePlace": "writePlace",
		"leaveSettings": "writeSettings", "leftSettings": "readLastSettings", "leave": "statefile.Replace",
		"mendEvery": "reconcileEvery", "mendQuiet": "reconcileDelay", "mendTime": "reconcileTime",
		"roundEvery": "reconcileEvery", "roundQuiet": "reconcileDelay", "roundTime": "reconcileTime",
		"runRounds": "reconcileUntilDone", "runRound": "reconcileOnce", "unasked": "withoutRequest",
	},
	"driver": {
		"heldPorts": "boundPorts", "HoldPorts": "BindPorts", "agrees": "checkSharedBridge",
		"forget": "forgetNetwork", "Holder": "WhoHas", "Used": "NetworkMade", "Agrees": "CheckNIC",
		"Compare": "ForgetUnlisted", "Reserve": "HoldAllAux", "onOff": "parseOnOff",
	},
	"ipamdriver": {
		"Used": "NetworkMade", "Agrees": "CheckNIC", "Reserve": "HoldAux", "Holder": "WhoHas",
		"Attached": "FindLink", "forget": "dropChoice", "foreign": "isNobodysToLend", "flat": "escapePrefix",
		"unflat": "unescapePrefix", "colons": "withColons", "parseSubnet": "parseExactPrefix",
	},
	"internal/statefile": {
		"graft": "graftValue", "lenient": "decodeLenient", "taken": "markTaken", "Durable": "UpdateDurably",
		"Aside": "ListAside", "patience": "lockPatience",
	},
	"internal/dump": {
		"patience": "repeatTime",
	},
	"internal/upkeep": {
		"Release": "ReleaseLeaked", "Adopt": "AdoptLost", "refuseHeld": "refuseLinkless",
	},
	"internal/lender": {
		"someAreLed": "someAreRouted", "roundTime": "reconcileTime",
	},
	"pool": {
		"standing": "lendability", "standingOf": "lendabilityOf", "isHeld": "isLeased", "isLed": "isRouted",
		"led": "routed", "Led": "Routed", "LedTo": "RoutedBy", "describeLed": "describeRouted",
		"parseSubnet": "parseSubnetMasked",
		"Keep":        "MakeLinkless", "ponder": "questionFor",
		"lag": "describeAge", "silence": "silenceError",
		"aside": "quickQuestion", "soon": "pressingAge", "unadopted": "needsAdoption", "passing": "mayPass",
		"unmarked": "trimBody", "squeezed": "withoutBlanks", "unlike": "wrongFormat", "absurd": "isAbsurd",
		"plausible": "arePlausible", "disagreement": "listDisagreements",
	},
}

// TestNamesMeanOneThing: no name of ours hides one of Go's own, and no retired name comes back.
func TestNamesMeanOneThing(t *testing.T) {
	found := map[string]map[string]bool{}
	for _, p := range packages(t) {
		here := strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")
		if found[here] == nil {
			found[here] = map[string]bool{}
		}
		for _, name := range p.GoFiles {
			files := token.NewFileSet()
			f, err := parser.ParseFile(files, filepath.Join(p.Dir, name), nil, parser.SkipObjectResolution)
			if err != nil {
				t.Fatal(err)
			}
			for _, id := range declared(f) {
				found[here][id.name.Name] = true
				if types.Universe.Lookup(id.name.Name) != nil && !id.member {
					t.Errorf("%s: %s hides Go's own", files.Position(id.name.Pos()), id.name.Name)
				}
				if now := retired[here][id.name.Name]; now != "" {
					t.Errorf("%s: %s is called %s", files.Position(id.name.Pos()), id.name.Name, now)
				}
			}
		}
	}
	for here, names := range retired {
		if len(found[here]) == 0 {
			t.Errorf("%s declares nothing: its retired names are for nobody", here)
		}
		for old, now := range names {
			if token.IsIdentifier(now) && !found[here][now] {
				t.Errorf("%s: %s is called %s, and nothing has that name", here, old, now)
			}
		}
	}
	if len(found["bridge"]) < 500 {
		t.Errorf("%d names are declared in bridge: this test is blind", len(found["bridge"]))
	}
}

// declaration is a name where it is declared. A member is a field or a method, which hides nothing.
type declaration struct {
	name   *ast.Ident
	member bool
}

func declared(f *ast.File) (all []declaration) {
	add := func(member bool, names ...*ast.Ident) {
		for _, id := range names {
			all = append(all, declaration{id, member})
		}
	}
	ast.Inspect(f, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.FuncDecl:
			add(n.Recv != nil, n.Name)
		case *ast.TypeSpec:
			add(false, n.Name)
		case *ast.ValueSpec:
			add(false, n.Names...)
		case *ast.StructType:
			for _, field := range n.Fields.List {
				add(true, field.Names...)
			}
		case *ast.FuncType:
			for _, list := range []*ast.FieldList{n.Params, n.Results} {
				if list != nil {
					for _, field := range list.List {
						add(false, field.Names...)
					}
				}
			}
		case *ast.InterfaceType:
			for _, method := range n.Methods.List {
				add(true, method.Names...)
			}
		case *ast.AssignStmt:
			if n.Tok == token.DEFINE {
				for _, e := range n.Lhs {
					if id, ok := e.(*ast.Ident); ok {
						add(false, id)
					}
				}
			}
		case *ast.RangeStmt:
			for _, e := range []ast.Expr{n.Key, n.Value} {
				if id, ok := e.(*ast.Ident); ok && n.Tok == token.DEFINE {
					add(false, id)
				}
			}
		}
		return true
	})
	return all
}
