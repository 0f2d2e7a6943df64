package docs

import (
	"encoding/json"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const (
	alerts    = "deploy/prometheus/"
	dashboard = "deploy/grafana/sallyport.json"
)

// TestAlertRules: each alert fires when it should, says what it should, and is quiet before and after.
func TestAlertRules(t *testing.T) {
	if _, err := exec.LookPath("promtool"); err != nil {
		t.Skip("no promtool; `make test` installs it")
	}
	for _, args := range [][]string{{"check", "rules", "rules.yaml"}, {"test", "rules", "rules_test.yaml"}, {"check", "config", "prometheus.yaml"}} {
		cmd := exec.Command("promtool", args...)
		cmd.Dir = filepath.Join(root, alerts)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
}

// TestEachAlertIsTested: a rule that nothing holds is found.
func TestEachAlertIsTested(t *testing.T) {
	tests := read(t, alerts+"rules_test.yaml")
	for _, m := range regexp.MustCompile(`(?m)^ +- alert: (\w+)$`).FindAllStringSubmatch(read(t, alerts+"rules.yaml"), -1) {
		if !strings.Contains(tests, "alertname: "+m[1]+"\n        exp_alerts:") {
			t.Errorf("%s is not tested", m[1])
		}
	}
}

// TestAlertsKnowTheMetrics: rules and dashboard name only metrics that agent and collector have.
func TestAlertsKnowTheMetrics(t *testing.T) {
	agent, collector := read(t, "pkg/agent/metrics.go"), read(t, "pkg/collector/metrics.go")
	if !json.Valid([]byte(read(t, dashboard))) {
		t.Errorf("%s is no JSON", dashboard)
	}
	for _, file := range []string{alerts + "rules.yaml", alerts + "rules_test.yaml", dashboard} {
		names := regexp.MustCompile(`\bsallyport_\w+`).FindAllString(read(t, file), -1)
		if len(names) == 0 {
			t.Errorf("%s names no metric", file)
		}
		for _, name := range names {
			own, isCollector := strings.CutPrefix(name, "sallyport_collector_")
			in := agent
			if isCollector {
				in = collector
			} else {
				own = strings.TrimPrefix(name, "sallyport_")
			}
			if !strings.Contains(in, `"`+own+`"`) && !strings.Contains(in, `"`+name+`"`) {
				t.Errorf("%s: no metric %s", file, name)
			}
		}
	}
}
