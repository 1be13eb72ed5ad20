package main

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/culvert-dev/culvert/cluster"
	"github.com/culvert-dev/culvert/daemon/api"
)

// A shell reads back each value, from both forms that are for shells.
func TestEnvFormatsInShell(t *testing.T) {
	for _, value := range []string{"", "plain", "a b", "it's", `"q"`, "$HOME `id` $(id) \\n \\", "two\nlines", "#x", "tab\t", "é'$x`\"\\"} {
		for _, format := range []string{formatDotenv, formatExport} {
			var out bytes.Buffer
			a := &app{out: &out, err: &out, output: "text"}
			if err := a.printVars([]cluster.Var{{Name: "V", Value: value}}, format); err != nil {
				t.Fatal(err)
			}
			got, err := exec.Command("sh", "-c", out.String()+"\nprintf %s \"$V\"").Output()
			if err != nil || string(got) != value {
				t.Errorf("%s: %q came back as %q, %v (%s)", format, value, got, err, out.String())
			}
		}
	}
}

func TestEnvFormats(t *testing.T) {
	vars := []cluster.Var{{Name: "A", Value: "1"}, {Name: "b.c", Value: "two\nlines"}, {Name: "NUL", Value: "\x00"}}
	text := func(format string) string {
		var out, notes bytes.Buffer
		a := &app{out: &out, err: &notes, output: "text"}
		if err := a.printVars(vars, format); err != nil {
			t.Fatal(err)
		}
		return out.String() + notes.String()
	}
	if got := text(formatDotenv); !strings.HasPrefix(got, "A=1\nb.c='two\nlines'\n") || !strings.Contains(got, "left out, because this format cannot have them: NUL") {
		t.Error(got)
	}
	if got := text(formatExport); !strings.HasPrefix(got, "export A='1'\n") || !strings.Contains(got, "b.c, NUL") {
		t.Error(got)
	}
	for format, parse := range map[string]func([]byte, any) error{
		formatJSON: json.Unmarshal,
		formatYAML: func(b []byte, v any) error { return yaml.Unmarshal(b, v) },
	} {
		got := map[string]string{}
		if err := parse([]byte(text(format)), &got); err != nil || len(got) != 3 || got["b.c"] != "two\nlines" || got["NUL"] != "\x00" {
			t.Errorf("%s: %q, %v", format, got, err)
		}
	}
}

func TestEnvArguments(t *testing.T) {
	for _, x := range []struct {
		args []string
		want string
	}{
		{[]string{"env"}, "a workload is missing"},
		{[]string{"env", "deploy/web", "--format", "toml"}, `--format "toml" is unknown`},
		{[]string{"env", "deploy/web", "--advertise", "nacos"}, "--advertise is about this machine's exposed ports"},
		{[]string{"env", "--advertise", "etcd"}, `--advertise "etcd" is unknown`},
	} {
		var out, errs bytes.Buffer
		code := newApp("culvert", os.Stdin, &out, &errs).run(t.Context(), x.args)
		if code != exitUsage || !strings.Contains(errs.String(), x.want) {
			t.Errorf("%q: code %d, %s", x.args, code, errs.String())
		}
	}
}

func TestEnvAdvertised(t *testing.T) {
	intercepts := []api.Intercept{
		{Kind: api.KindExchange, Context: "x", Addresses: []string{"10.9.9.9:1"}},
		{Kind: api.KindExpose, Context: "x", Addresses: []string{"[fd00::7]:9091", "10.244.1.7:9091"}},
		{Kind: api.KindExpose, Context: "x", Addresses: []string{"10.244.1.7:8080"}},
		{Kind: api.KindExpose, Context: "y", Addresses: []string{"10.2.2.2:8080"}},
	}
	at, others, err := advertised(intercepts, "x")
	if err != nil || at.String() != "10.244.1.7:9091" || !slices.Equal(others, []string{"[fd00::7]:9091", "10.244.1.7:8080"}) {
		t.Errorf("%v, %q, %v", at, others, err)
	}
	if at, _, err := advertised(intercepts, "z"); err == nil {
		t.Error(at)
	}
	var all []string
	for _, v := range advertisedVars("all", netip.MustParseAddrPort("10.244.1.7:9091")) {
		all = append(all, v.Name+"="+v.Value)
	}
	for _, want := range []string{
		"SPRING_CLOUD_NACOS_DISCOVERY_IP=10.244.1.7", "SPRING_CLOUD_NACOS_DISCOVERY_PORT=9091",
		"EUREKA_INSTANCE_PREFERIPADDRESS=true", "EUREKA_INSTANCE_IPADDRESS=10.244.1.7", "EUREKA_INSTANCE_NONSECUREPORT=9091",
		"DUBBO_IP_TO_REGISTRY=10.244.1.7", "DUBBO_PORT_TO_REGISTRY=9091",
	} {
		if !slices.Contains(all, want) {
			t.Errorf("%s is not in %q", want, all)
		}
	}
	if one := advertisedVars("dubbo", at); len(one) != 2 {
		t.Errorf("%+v", one)
	}
}
